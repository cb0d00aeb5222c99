import io
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from torch import nn
from torchvision import models

from trainer.config import build_loaders
from trainer.config.build_checkpoints import make_retention_policy
from trainer.config.build_loaders import Evaluator
from trainer.config.build_model import make_model, make_param_groups
from trainer.config.parse import parse
from trainer.config.preflight import check_run_data
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.run_data import RunData, make_schedule
from trainer.data.index import DatasetIndex, Example
from trainer.data.prepare import Prepared
from trainer.data.sampler import EpochOrder
from trainer.errors import UserError
from trainer.model.built import BuiltModel
from trainer.model.metadata import ModelMetadata, write_model
from trainer.optim.schedule import TrainSchedule
from trainer.report.block_table import block_table

ORDER = EpochOrder(examples=25, batch_size=10, seed=0)  # 3 steps per epoch


def resolved(*options: str) -> ResolvedConfig:
    """Return a config of a small resnet18 with random weights, with these options."""
    return resolve(parse(["--data.root=x", "--data.image_size=32", "--model.weights=null", *options]))


def build(config: ResolvedConfig, classes: Any = "abc", weights: str | None = None, **arguments: Any) -> BuiltModel:
    return make_model(config, classes, weights, on_progress=print, **arguments)


def index(count: int = 4, *, val: int = 0) -> DatasetIndex:
    examples = tuple(Example(f"{i}.png", i % 2) for i in range(count))
    splits = {"train": examples, "val": examples[:val], "test": examples}
    return DatasetIndex(root=Path(), classes=("a", "b"), reported="", split_made=False, notes=(), **splits)


# Durations


def test_schedule_has_the_warmup_and_batches_of_the_run() -> None:
    def schedule(warmup: str) -> TrainSchedule:
        options = [f"--optim.warmup={warmup}", "--optim.schedule=constant", "--train.epochs=2"]
        return make_schedule(resolved(*options), ORDER)

    for warmup in ("1 epochs", "3 steps", "50%"):
        assert schedule(warmup).batch_sizes == (10, 10, 5)
        multipliers = [schedule(warmup).lr_multiplier(step) for step in range(6)]
        assert multipliers == [*(pytest.approx((step + 1) / 3) for step in range(3)), 1, 1, 1]
    for warmup in ("7 steps", "100 epochs"):
        with pytest.raises(UserError, match=r"optim\.warmup .* the run has 6"):
            schedule(warmup)


@pytest.mark.parametrize(
    ("every", "keep_every", "expected"),
    [
        ("1 epoch", "null", (3, None, None)),
        ("null", "null", (None, None, None)),
        ("2 steps", "2 epochs", (2, None, 6)),
        ("50%", "100%", (6, None, 12)),
        ("0.5 epochs", "null", (2, None, None)),
        ("1%", "0.01 epochs", (1, None, 1)),
        ("2 min", "null", (None, 120, None)),
    ],
)
def test_checkpoint_intervals_become_at_least_one_step(
    every: str, keep_every: str, expected: tuple[int | None, float | None, int | None]
) -> None:
    config = resolved(f"--checkpoint.every={every}", f"--checkpoint.keep_every={keep_every}", "--train.epochs=4")
    policy = make_retention_policy(config, ORDER.steps_per_epoch)
    assert (policy.every_steps, policy.every_seconds, policy.keep_every) == expected
    assert (policy.keep_last, policy.keep_best) == (2, True)


# Parameter groups


def learning_rates(option: str) -> dict[str, float]:
    """Return parameter name of resnet18 -> learning rate."""
    config = resolved("--optim.lr=1", option)
    built = build(config)
    names = {id(parameter): name for name, parameter in built.model.named_parameters()}
    groups = make_param_groups(built, config)
    return {names[id(parameter)]: group.lr for group in groups for parameter in group.parameters}


def test_layer_decay_lowers_the_rate_of_each_block_below_the_head() -> None:
    rates = learning_rates("--optim.layer_decay=0.5")
    assert {name.partition(".")[0]: rate for name, rate in rates.items()} == {
        "fc": 10.0, "layer4": 0.5, "layer3": 0.25, "layer2": 0.125, "layer1": 0.0625, "conv1": 0.03125, "bn1": 0.03125,
    }  # fmt: skip


def test_last_matching_lr_mult_applies() -> None:
    rates = learning_rates("--optim.lr_mult={'layer*': 0.1, layer4: 3, fc.bias: 2, layer1.0.bn1.bias: 0.5}")
    expected = {"conv1.weight": 1, "layer2.0.bn1.bias": 0.1, "layer1.0.bn1.bias": 0.5, "layer4.0.bn1.bias": 3,
                "fc.weight": 10, "fc.bias": 20}  # fmt: skip
    assert {name: rates[name] for name in expected} == expected
    with pytest.raises(UserError, match="'layre' matches no parameter of this model; its blocks are conv1"):
        learning_rates("--optim.lr_mult={layre: 1}")


@pytest.mark.parametrize(
    ("trainable", "row"),
    [
        ("all", "layer4 yes 8,393,728 0.001 0.1 train"),
        ("head", "layer4 frozen 8,393,728 - - frozen"),
        ("{0: head, 2: layer4}", "layer4 from epoch 3 8,393,728 0.001 0.1 frozen"),
        ("{0: head, 2: layer4.*.weight}", "layer4 in part 8,393,728 0.001 0.1 frozen"),
    ],
)
def test_block_table_shows_what_trains(trainable: str, row: str) -> None:
    config = resolved(f"--transfer.trainable={trainable}", "--optim.lr=1e-3", "--optim.weight_decay=0.1")
    built = build(config)
    file = io.StringIO()
    Console(file=file, width=120).print(block_table(built, make_param_groups(built, config)))
    lines = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert [line[0] for line in lines[2:]] == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [" ".join(line) for line in lines[-2:]] == [row, "fc (new) yes 1,539 0.01 0.1 -"]


@pytest.mark.parametrize(
    ("trainable", "reported"),
    [
        ("{0: head, 2: layer4, 9: all}", "ends after epoch 3, before the stage that starts with epoch 10"),
        ("head", "frozen parameters keep their random values"),
        ("{0: head, 1: all}", None),
    ],
)
def test_unreached_stage_and_frozen_random_parameters_are_reported(trainable: str, reported: str | None) -> None:
    summary = build(resolved(f"--transfer.trainable={trainable}", "--train.epochs=3")).summary
    lines = [line for line in summary if "transfer.trainable" in line or "frozen" in line]
    assert [reported in line for line in lines] == ([True] if reported else [])


def test_source_classes_of_a_model_file_are_those_in_its_metadata(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = models.squeezenet1_1(num_classes=3)
    preprocessing = resolved().data.preprocessing
    facts: dict[str, Any] = {"version": "0", "architecture": "squeezenet1_1", "source": "", "metrics": {}}
    metadata = ModelMetadata(classes=("bee", "ant", "cat"), preprocessing=preprocessing, **facts)
    path = str(tmp_path / "model.safetensors")
    write_model(Path(path), source.state_dict(), metadata)
    model = ["--model.name=squeezenet1_1", "--model.head_init=source-labels", "--model.aliases={Felix: cat}"]
    built = build(resolved(*model, f"--model.weights={path}"), ["Felix", "ants"], path)
    weight = source.classifier[1].weight
    assert torch.equal(built.model.classifier[1].weight, weight[[2, 1]] - weight.mean(0))
    assert path in "\n".join(built.summary)
    # After pretraining, the weights are the file of that phase, and model.weights is null.
    again = build(resolved(*model, "--pretrain.root=x"), ["Felix", "ants"], path)
    assert torch.equal(again.model.classifier[1].weight, built.model.classifier[1].weight)


# Checks of the data


def context(*, world_size: int = 1, device: str = "cpu") -> Any:
    """Return the properties of a process group, without the processes."""
    processes = {"world_size": world_size, "local_world_size": world_size, "rank": 0}
    return SimpleNamespace(
        **processes, device=torch.device(device), cores=1, threads=1, raise_on_all_ranks=lambda error: None
    )


def synchronized(*options: str) -> ResolvedConfig:
    return resolved("--transfer.batch_norm=sync", "--train.batch_size=10", *options)


def check(config: ResolvedConfig, ctx: Any, order: EpochOrder = ORDER, **arguments: Any) -> None:
    check_run_data(
        config,
        RunData(prepared=Prepared(index(**arguments), ()), order=order, schedule=make_schedule(config, order)),
        ctx,
    )


@pytest.mark.parametrize(
    ("config", "examples", "world_size", "device", "message"),
    [
        (synchronized(), 25, 2, "cpu", "which needs GPUs: .* Choose frozen, .* or run one process"),
        (synchronized("--train.grad_accum_steps=2"), 25, 1, "cpu", r"train\.grad_accum_steps 2 .* set it to 1"),
        (synchronized("--train.micro_batch_size=auto"), 25, 1, "cpu", r"micro_batch_size auto .* set it to null"),
        (synchronized(), 25, 6, "cuda", "a batch of 5, fewer than the 6 processes: choose another"),
        (synchronized(), 21, 2, "cuda", "a batch of 1, fewer than the 2"),
    ],
)
def test_sync_batch_norm_is_refused_without_the_whole_global_batch(
    config: ResolvedConfig, examples: int, world_size: int, device: str, message: str
) -> None:
    check(synchronized(), context(device="cpu"))
    check(synchronized(), context(world_size=5, device="cuda"))
    order = replace(ORDER, examples=examples)
    with pytest.raises(UserError, match=r"transfer\.batch_norm is sync, .*" + message):
        check(config, context(world_size=world_size, device=device), order)


def test_selection_needs_a_validation_split() -> None:
    selecting = ["--regularization.early_stopping=2", "--transfer.wise_ft=true"]
    config = resolved("--pretrain.root=x", *selecting)
    check(config, None, val=2)
    with pytest.raises(UserError, match=r"early_stopping 2 and transfer\.wise_ft .* data\.val_fraction 0\.1"):
        check(config, None)


def test_batch_norm_is_synchronized_on_several_processes() -> None:
    other, single, several = (
        build(config, world_size=world_size).model
        for config, world_size in ((resolved(), 2), (synchronized(), 1), (synchronized(), 2))
    )

    def batch_norm_types(model: nn.Module) -> set[type]:
        return {type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)}

    assert batch_norm_types(other) == batch_norm_types(single) == {nn.BatchNorm2d}
    assert batch_norm_types(several) == {nn.SyncBatchNorm}
    torch.testing.assert_close(several.state_dict(), single.state_dict(), rtol=0, atol=0)  # interchangeable checkpoints
    assert several.conv1.weight.is_contiguous(memory_format=torch.channels_last)


# Loaders


@pytest.mark.parametrize("world_size", [1, 3, 16])
@pytest.mark.parametrize("count", [1, 8, 23])
def test_all_ranks_evaluate_as_many_batches_as_the_longest(
    count: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_batches: list[int] = []
    lengths: list[list[int]] = []

    def record(model: nn.Module, batches: Any, **arguments: Any) -> None:
        num_batches.append(arguments["num_batches"])
        lengths[-1].append(len(batches))

    monkeypatch.setattr(build_loaders, "evaluate", record)
    ctx = context(world_size=world_size)
    ctx.accelerator = Accelerator(cpu=True)
    config = resolved("--train.batch_size=16")
    for ctx.rank in range(world_size):
        lengths.append([])
        Evaluator(index(count, val=1), config, ctx)(nn.Identity(), lambda: False)
    longest = [max(of_split) for of_split in zip(*lengths, strict=True)]
    assert num_batches == longest * world_size
    assert longest == [1, math.ceil(count / (world_size * 8))]
