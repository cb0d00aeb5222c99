import io
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import nn
from torchvision import models
from trainer.config.builders import Evaluator, make_retention_policy, make_schedule
from trainer.config.model_builder import make_model, make_param_groups

from trainer.checkpoint.retention import RetentionPolicy
from trainer.config import builders
from trainer.config.preflight import require_sync_batch_norm
from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.data.augment import Preprocessing
from trainer.data.index import DatasetIndex, Example
from trainer.data.loader import EpochOrder
from trainer.distributed import context
from trainer.errors import UserError
from trainer.model.metadata import ModelMetadata, write_model
from trainer.report.block_table import block_table

ORDER = EpochOrder(examples=25, batch_size=10, seed=0)  # 3 steps an epoch


def plan(warmup: str) -> Any:
    return make_schedule(
        Config(optim=OptimConfig(warmup=warmup, schedule="constant"), train=TrainConfig(epochs=2)),
        ORDER,
    )


def test_durations_become_steps_of_this_run() -> None:
    made = plan("1 epochs")
    assert made.batch_sizes == (10, 10, 5)
    assert [made.lr_multiplier(step) for step in range(6)] == [
        pytest.approx((step + 1) / 3) for step in range(3)
    ] + [1.0] * 3


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    assert plan("6 steps").lr_multiplier(5) == 1
    for warmup in ("7 steps", "100 epochs"):
        with pytest.raises(UserError, match=r"optim\.warmup .* the run has 6"):
            plan(warmup)


@pytest.mark.parametrize(
    ("given", "steps", "seconds", "keep_every"),
    [
        (CheckpointConfig(), 3, None, None),
        (CheckpointConfig(every=None), None, None, None),
        (CheckpointConfig(every="2 steps", keep_every="2 epochs"), 2, None, 6),
        (CheckpointConfig(every="50%", keep_every="100%"), 6, None, 12),
        (CheckpointConfig(every="0.5 epochs"), 2, None, None),
        (CheckpointConfig(every="1%", keep_every="0.01 epochs"), 1, None, 1),
        (CheckpointConfig(every="2 min"), None, 120, None),
    ],
)
def test_intervals_become_steps_of_this_run_and_at_least_one(
    given: CheckpointConfig, steps: int | None, seconds: float | None, keep_every: int | None
) -> None:
    assert make_retention_policy(
        Config(checkpoint=given, train=TrainConfig(epochs=4)), ORDER
    ) == RetentionPolicy(
        every_steps=steps, every_seconds=seconds, keep_last=2, keep_best=True, keep_every=keep_every
    )


# Parameter groups


def rates(**optim: Any) -> dict[str, set[tuple[str, float, float]]]:
    """Return block of resnet18 -> (group, learning rate, weight decay) of its parameters."""
    transfer = TransferConfig(trainable=optim.pop("train", "all"))
    given: dict[str, Any] = {"lr": 1.0, "weight_decay": 0.5} | optim
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(weights=None),
        transfer=transfer,
        optim=OptimConfig(**given),
    )
    created = make_model(config, "abc", None, on_progress=print)
    groups = make_param_groups(created, config)
    every = [parameter for group in groups for parameter in group.parameters]
    assert len(every) == len({id(p) for p in every}), "a parameter is in one group"
    group_of = {id(parameter): group for group in groups for parameter in group.parameters}
    found: dict[str, set[tuple[str, float, float]]] = {}
    for name, parameter in created.model.named_parameters():
        group = group_of.get(id(parameter))
        if group is not None:
            found.setdefault(name.split(".")[0], set()).add((group.name, group.lr, group.weight_decay))
    return found


def test_there_are_the_notes_two_groups_unless_more_is_asked_for() -> None:
    found = rates()
    assert found.pop("fc") == {("head", 10.0, 0.5)}
    assert set(found) == {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"}
    assert all(groups == {("backbone", 1.0, 0.5)} for groups in found.values())


def test_the_rate_falls_with_each_block_below_the_head() -> None:
    assert {name: groups.pop()[1] for name, groups in rates(layer_decay=0.5).items()} == {
        "fc": 10.0, "layer4": 0.5, "layer3": 0.25, "layer2": 0.125, "layer1": 0.0625, "conv1": 0.03125, "bn1": 0.03125,
    }  # fmt: skip


def test_patterns_multiply_rates_and_the_last_that_matches_counts() -> None:
    found = rates(lr_mult={"layer*": 0.1, "layer4": 3, "fc.bias": 2, "layer1.0.bn1.bias": 0.5})
    assert found["layer2"] == {("backbone", 0.1, 0.5)}
    assert found["layer4"] == {("backbone", 3.0, 0.5)}
    assert found["fc"] == {("head", 10.0, 0.5), ("head", 20.0, 0.5)}
    assert found["layer1"] == {("backbone", 0.1, 0.5), ("backbone", 0.5, 0.5)}
    assert found["conv1"] == {("backbone", 1.0, 0.5)}
    with pytest.raises(UserError, match="'layre' matches no parameter of this model; its blocks are conv1"):
        rates(lr_mult={"layre": 1})


def test_weight_decay_is_kept_off_norms_and_biases_on_demand() -> None:
    found = rates(decay_norm_and_bias=False)
    assert found["bn1"] == {("backbone", 1.0, 0.0)}
    assert found["conv1"] == {("backbone", 1.0, 0.5)}
    assert found["fc"] == {("head", 10.0, 0.5), ("head", 10.0, 0.0)}


def test_groups_are_of_all_that_ever_trains_and_of_nothing_else() -> None:
    assert set(rates(train="head")) == {"fc"}
    assert set(rates(train={0: "head", 5: "last:2"})) == {"fc", "layer4"}


@pytest.mark.parametrize(
    ("train", "row"),
    [
        ("all", "layer4 yes 8,393,728 0.001 0.1 train"),
        ("head", "layer4 frozen 8,393,728 - - frozen"),
        ({0: "head", 2: "layer4"}, "layer4 from epoch 3 8,393,728 0.001 0.1 frozen"),
        ({0: "head", 2: "layer4.*.weight"}, "layer4 in part 8,393,728 0.001 0.1 frozen"),
    ],
)
def test_the_table_says_of_each_block_what_becomes_of_it(train: Any, row: str) -> None:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(weights=None),
        transfer=TransferConfig(trainable=train),
        optim=OptimConfig(lr=1e-3, weight_decay=0.1),
    )
    created = make_model(config, "abc", None, on_progress=print)
    file = io.StringIO()
    Console(file=file, width=120).print(block_table(created, make_param_groups(created, config)))
    lines = [line.split() for line in file.getvalue().splitlines() if line.strip()]
    assert [line[0] for line in lines[2:]] == ["conv1", "layer1", "layer2", "layer3", "layer4", "fc"]
    assert [" ".join(line) for line in lines[-2:]] == [row, "fc (new) yes 1,539 0.01 0.1 -"]


def test_a_stage_that_never_comes_is_told_of() -> None:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(weights=None),
        transfer=TransferConfig(trainable={0: "head", 2: "layer4", 9: "all"}),
        train=TrainConfig(epochs=3),
    )
    lines = make_model(config, "abc", None, on_progress=print).summary
    assert [line for line in lines if "stage" in line] == [
        "transfer.trainable: the run ends after epoch 3, before the stage from epoch 10 on"
    ]


@pytest.mark.parametrize(("train", "told"), [("head", 1), ({0: "head", 1: "all"}, 0), ("all", 0)])
def test_layers_that_nobody_ever_trains_are_told_of(train: Any, told: int) -> None:
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(name="shufflenet_v2_x0_5", weights=None),
        transfer=TransferConfig(trainable=train),
    )
    lines = make_model(config, "abc", None, on_progress=print).summary
    assert sum("keeps the values that were drawn for it" in line for line in lines) == told


# BatchNorm over the global batch


class Machine:
    """One of `world_size` processes on a device of that kind."""

    def __init__(self, world_size: int, device: str) -> None:
        self.world_size = world_size
        self.accelerator = self
        self.device = torch.device(device)


def synchronised(batch_size: int = 10, **train: Any) -> Config:
    return Config(
        transfer=TransferConfig(batch_norm="sync"),
        train=TrainConfig(batch_size=batch_size, **train),
        model=ModelConfig(name="resnet18", weights=None),
        data=DataConfig(image_size=32),
    )


@pytest.mark.parametrize(("world_size", "device"), [(1, "cpu"), (1, "cuda"), (2, "cuda"), (5, "cuda")])
def test_gpus_and_single_processes_synchronise(world_size: int, device: str) -> None:
    require_sync_batch_norm(synchronised(), ORDER, Machine(world_size, device))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "order", "world_size", "device", "said"),
    [
        (synchronised(), ORDER, 2, "cpu", "which needs GPUs: .* Choose frozen, .* or run one process"),
        (synchronised(grad_accum_steps=2), ORDER, 1, "cpu", r"train\.accumulation 2 .* set it to 1"),
        (synchronised(grad_accum_steps=2), ORDER, 2, "cuda", r"train\.accumulation 2 .* set it to 1"),
        (synchronised(), ORDER, 6, "cuda", "a batch of 5, fewer than the 6 processes: choose another"),
        (
            synchronised(),
            EpochOrder(examples=21, batch_size=10, seed=0),
            2,
            "cuda",
            "a batch of 1, fewer than the 2",
        ),
    ],
)
def test_where_the_global_batch_is_not_seen_at_once_it_is_refused(
    config: Config, order: EpochOrder, world_size: int, device: str, said: str
) -> None:
    with pytest.raises(UserError, match=r"transfer\.batch_norm is sync, .*" + said):
        require_sync_batch_norm(config, order, Machine(world_size, device))  # type: ignore[arg-type]


def test_the_classes_of_a_model_file_of_regraft_are_what_it_says_they_are(tmp_path: Path) -> None:
    torch.manual_seed(2)
    source = models.squeezenet1_1(num_classes=3)
    preprocessing = Preprocessing(
        image_size=32,
        resize_size=32,
        resize="squash",
        interpolation="bilinear",
        mean=(0, 0, 0),
        std=(1, 1, 1),
    )
    description = ModelMetadata(
        version="0",
        architecture="squeezenet1_1",
        classes=("bee", "ant", "cat"),
        preprocessing=preprocessing,
        source="",
        metrics={},
    )
    path = tmp_path / "model.safetensors"
    write_model(path, source.state_dict(), description)
    config = Config(
        data=DataConfig(image_size=32),
        model=ModelConfig(
            name="squeezenet1_1", weights=str(path), head_init="source-labels", aliases={"Felix": "cat"}
        ),
    )
    made = make_model(config, ["Felix", "ants"], str(path), on_progress=print)
    weight = source.classifier[1].weight
    assert torch.equal(made.model.classifier[1].weight, weight[[2, 1]] - weight.mean(0))
    assert f"what file {path} says of itself" in "\n".join(made.summary)
    # With a source stage it is that stage's file, whatever model.weights says.
    config = replace(config, pretrain=PretrainConfig(root="x"), model=replace(config.model, weights=None))
    again = make_model(config, ["Felix", "ants"], str(path), on_progress=print)
    assert torch.equal(again.model.classifier[1].weight, made.model.classifier[1].weight)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_other_batch_norms_are_never_refused(batch_norm: Any) -> None:
    config = Config(transfer=TransferConfig(batch_norm=batch_norm), train=TrainConfig(grad_accum_steps=4))
    require_sync_batch_norm(config, ORDER, Machine(6, "cpu"))  # type: ignore[arg-type]


def test_layers_are_synchronised_where_there_is_somebody_to_synchronise_with() -> None:
    alone, one, several = (
        make_model(config, "abc", None, world_size=world_size, on_progress=print).model
        for config, world_size in ((Config(data=DataConfig(image_size=32), model=synchronised().model), 2),
                              (synchronised(), 1), (synchronised(), 2))
    )  # fmt: skip

    def kinds(model: nn.Module) -> set[type]:
        return {
            type(layer) for layer in model.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        }

    assert (kinds(alone), kinds(one), kinds(several)) == (
        {nn.BatchNorm2d},
        {nn.BatchNorm2d},
        {nn.SyncBatchNorm},
    )
    ours, theirs = one.state_dict(), several.state_dict()
    assert ours.keys() == theirs.keys(), "a checkpoint of one is one of the other"
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert several.conv1.weight.is_contiguous(memory_format=torch.channels_last)


# Evaluation in rounds


@pytest.fixture
def ctx() -> Iterator[context.DistributedContext]:
    threads = torch.get_num_threads()
    yield context.start(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 8, 9, 23])
def test_there_are_as_many_rounds_as_the_process_with_most_batches_has(
    count: int, world_size: int, ctx: context.DistributedContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tuple(Example(f"{i}.png", i % 2) for i in range(count))
    index = DatasetIndex(
        root=None,
        classes=("a", "b"),
        train=part,
        val=part[:1],
        test=part,
        reported="",
        split_made=False,
        notes=(),
    )  # type: ignore[arg-type]
    preprocessing = Preprocessing(
        image_size=8,
        resize_size=8,
        resize="squash",
        interpolation="bilinear",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
    )
    asked: list[int] = []
    lengths: list[list[int]] = []

    class OneOf:
        accelerator, threads, cores = ctx.accelerator, 1, 1

        def __init__(self, rank: int) -> None:
            self.rank, self.world_size = rank, world_size

    monkeypatch.setattr(builders, "evaluate", lambda model, batches, **given: asked.append(given["rounds"]))
    for rank in range(world_size):
        evaluator = Evaluator(index, preprocessing, synchronised(batch_size=16), OneOf(rank))  # type: ignore[arg-type]
        lengths.append([len(loader) for _, loader in evaluator._parts.values()])  # type: ignore[arg-type]
        evaluator(nn.Identity(), lambda: False)
    most = [max(lengths_of_part) for lengths_of_part in zip(*lengths, strict=True)]
    assert asked == most * world_size, "all processes make as many, for each part"
    assert most == [1, math.ceil(count / (world_size * 8))]
