import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torchvision import models

from trainer import assemble, runtime
from trainer.assemble import Evaluator, make_model, make_plan, make_policy, require_synchronisable
from trainer.checkpoint.policy import Policy
from trainer.config import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    SourceConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.data.augment import Preprocessing
from trainer.data.index import Example, ImageIndex
from trainer.data.loader import Order
from trainer.errors import UserError
from trainer.model_file import Description, write_model

ORDER = Order(examples=25, batch_size=10, seed=0)  # 3 steps an epoch


def plan(warmup: str) -> Any:
    return make_plan(
        Config(optim=OptimConfig(warmup=warmup, schedule="constant"), train=TrainConfig(epochs=2)),
        ORDER,
    )


def test_durations_become_steps_of_this_run() -> None:
    made = plan("1 epochs")
    assert made.batch_sizes == (10, 10, 5)
    assert [made.lr_factor(step) for step in range(6)] == [
        pytest.approx((step + 1) / 3) for step in range(3)
    ] + [1.0] * 3


def test_a_warm_up_longer_than_the_run_is_refused() -> None:
    assert plan("6 steps").lr_factor(5) == 1
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
    assert make_policy(Config(checkpoint=given, train=TrainConfig(epochs=4)), ORDER) == Policy(
        every_steps=steps, every_seconds=seconds, keep_last=2, keep_best=True, keep_every=keep_every
    )


# BatchNorm over the global batch


class Machine:
    """One of `world` processes on a device of that kind."""

    def __init__(self, world: int, device: str) -> None:
        self.world = world
        self.accelerator = self
        self.device = torch.device(device)


def synchronised(batch_size: int = 10, **train: Any) -> Config:
    return Config(
        transfer=TransferConfig(batch_norm="sync"),
        train=TrainConfig(batch_size=batch_size, **train),
        model=ModelConfig(name="resnet18", weights=None),
        data=DataConfig(image_size=32),
    )


@pytest.mark.parametrize(("world", "device"), [(1, "cpu"), (1, "cuda"), (2, "cuda"), (5, "cuda")])
def test_gpus_and_single_processes_synchronise(world: int, device: str) -> None:
    require_synchronisable(synchronised(), ORDER, Machine(world, device))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("config", "order", "world", "device", "said"),
    [
        (synchronised(), ORDER, 2, "cpu", "which needs GPUs: .* Choose frozen, .* or run one process"),
        (synchronised(accumulation=2), ORDER, 1, "cpu", r"train\.accumulation 2 .* set it to 1"),
        (synchronised(accumulation=2), ORDER, 2, "cuda", r"train\.accumulation 2 .* set it to 1"),
        (synchronised(), ORDER, 6, "cuda", "a batch of 5, fewer than the 6 processes: choose another"),
        (
            synchronised(),
            Order(examples=21, batch_size=10, seed=0),
            2,
            "cuda",
            "a batch of 1, fewer than the 2",
        ),
    ],
)
def test_where_the_global_batch_is_not_seen_at_once_it_is_refused(
    config: Config, order: Order, world: int, device: str, said: str
) -> None:
    with pytest.raises(UserError, match=r"transfer\.batch_norm is sync, .*" + said):
        require_synchronisable(config, order, Machine(world, device))  # type: ignore[arg-type]


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
    description = Description(
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
    assert f"what file {path} says of itself" in "\n".join(made.lines)
    # With a source stage it is that stage's file, whatever model.weights says.
    config = replace(config, source=SourceConfig(root="x"), model=replace(config.model, weights=None))
    again = make_model(config, ["Felix", "ants"], str(path), on_progress=print)
    assert torch.equal(again.model.classifier[1].weight, made.model.classifier[1].weight)


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_other_batch_norms_are_never_refused(batch_norm: Any) -> None:
    config = Config(transfer=TransferConfig(batch_norm=batch_norm), train=TrainConfig(accumulation=4))
    require_synchronisable(config, ORDER, Machine(6, "cpu"))  # type: ignore[arg-type]


def test_layers_are_synchronised_where_there_is_somebody_to_synchronise_with() -> None:
    alone, one, several = (
        make_model(config, "abc", None, world=world, on_progress=print).model
        for config, world in ((Config(data=DataConfig(image_size=32), model=synchronised().model), 2),
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
def machine() -> Iterator[runtime.Runtime]:
    threads = torch.get_num_threads()
    yield runtime.start(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


@pytest.mark.parametrize("world", [1, 2, 3, 7, 16])
@pytest.mark.parametrize("count", [1, 8, 9, 23])
def test_there_are_as_many_rounds_as_the_process_with_most_batches_has(
    count: int, world: int, machine: runtime.Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    part = tuple(Example(f"{i}.png", i % 2) for i in range(count))
    index = ImageIndex(
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
        accelerator, threads, cores = machine.accelerator, 1, 1

        def __init__(self, rank: int) -> None:
            self.rank, self.world = rank, world

    monkeypatch.setattr(assemble, "evaluate", lambda model, batches, **given: asked.append(given["rounds"]))
    for rank in range(world):
        evaluator = Evaluator(index, preprocessing, synchronised(batch_size=16), OneOf(rank))  # type: ignore[arg-type]
        lengths.append([len(loader) for _, loader in evaluator._parts.values()])  # type: ignore[arg-type]
        evaluator(nn.Identity(), lambda: False)
    most = [max(lengths_of_part) for lengths_of_part in zip(*lengths, strict=True)]
    assert asked == most * world, "all processes make as many, for each part"
    assert most == [1, math.ceil(count / (world * max(8, math.ceil(16 / world))))]
