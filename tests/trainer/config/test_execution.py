"""Tests of the choice of precision and memory layout of a run."""

import io
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.folders import image_folder
from tests.trainer.phases import with_options
from trainer.config import execution
from trainer.config.execution import FILE, Workload, choose_execution, with_one_execution
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.config.sections.data import DataConfig
from trainer.config.sections.model import ModelConfig
from trainer.config.sections.run import RunConfig
from trainer.config.sections.train import TrainConfig
from trainer.data.prepare import prepare
from trainer.distributed.context import DistributedContext
from trainer.distributed.precision import Execution
from trainer.errors import UserError
from trainer.optim.autotune import Measurement
from trainer.optim.core_wait import CoreWait

BF16 = Execution("bf16", channels_last=False)


@pytest.fixture
def workload(tmp_path: Path) -> Workload:
    root = image_folder(tmp_path / "images", {"train": {"a": 9, "b": 9}, "test": {"a": 1, "b": 1}})
    config = resolve(
        Config(
            run=RunConfig(device="cpu", threads=1),
            data=DataConfig(root=str(root), image_size=32, cache=str(tmp_path / "cache")),
            model=ModelConfig(name="squeezenet1_1", weights=None),
            train=TrainConfig(epochs=100, batch_size=8),
        )
    )
    index = prepare(config.data, workers=1, check=False).index
    return Workload(config=config, examples=index.train, classes=index.classes, weights=None)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Let bf16 without channels_last win; return the arguments of each measurement."""
    calls: list[dict[str, Any]] = []

    def autotune(model: torch.nn.Module, batches: Any, **arguments: Any) -> list[Measurement]:
        calls.append({"batches": batches, **arguments})
        fastest = Execution(arguments["precisions"][-1], arguments["layouts"][-1])
        return [Measurement(fastest, 30.0, 0.0, 0.01), Measurement(Execution("fp32", True), 15.0, 0.0, 0.0)]

    monkeypatch.setattr(execution, "autotune", autotune)
    monkeypatch.setattr(CoreWait, "fraction", lambda self: 0.0)
    return calls


def choose(
    workload: Workload, ctx: DistributedContext, saved: Execution | None = None, **options: Any
) -> tuple[ResolvedConfig, DistributedContext, str]:
    console = Console(file=io.StringIO(), width=300)
    workload = replace(workload, config=with_options(workload.config, train=options))
    config, ctx = choose_execution(workload, ctx, console, saved=saved)
    return config, ctx, console.file.getvalue()  # type: ignore[attr-defined]


def test_choice_is_measured_once(
    workload: Workload, ctx: DistributedContext, measured: Sequence[dict[str, Any]]
) -> None:
    for start in (1, 2):
        config, chosen, text = choose(workload, ctx)
        assert (config.train.precision, config.train.channels_last) == BF16
        assert chosen.precision == chosen.accelerator.mixed_precision == "bf16"
        figures = "measured, images/s of forward and backward: bf16 without channels_last 30, fp32 15"
        when = " (cached)" if start == 2 else ""
        assert text == f"precision bf16 without channels_last: {figures}{when}\n"
    assert len(measured) == 1
    (call,) = measured
    (inputs, labels), (other_inputs, _) = call["batches"]
    assert inputs.shape == other_inputs.shape == (4, 3, 32, 32)
    assert set(labels.tolist()) == {0, 1}
    assert not torch.equal(inputs, other_inputs)
    assert (call["precisions"], call["layouts"], call["batch_size"]) == (("fp32", "bf16"), (True, False), 4)
    choose(workload, ctx, precision="fp32", micro_batch_size=3)
    call = measured[1]
    assert (call["precisions"], call["layouts"], call["batch_size"]) == (("fp32",), (True, False), 3)


def test_short_runs_do_not_measure_the_layout_but_use_an_earlier_measurement(
    workload: Workload, ctx: DistributedContext, measured: Sequence[dict[str, Any]]
) -> None:
    config, _, _ = choose(workload, ctx, epochs=15)
    assert (config.train.precision, config.train.channels_last) == ("bf16", True)
    assert choose(workload, ctx, epochs=15)[2].endswith("(cached)\n")
    assert [call["layouts"] for call in measured] == [(True,)]
    for epochs in (57, 15):
        config, _, _ = choose(workload, ctx, epochs=epochs)
        assert (config.train.precision, config.train.channels_last) == BF16
    assert [call["layouts"] for call in measured] == [(True,), (True, False)]


def test_a_measurement_beside_other_processes_is_not_cached(
    workload: Workload, ctx: DistributedContext, measured: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(CoreWait, "fraction", lambda self: 1.0)
    for _ in range(2):
        assert choose(workload, ctx)[2].endswith("; not cached, because other processes used the cores\n")
    assert len(measured) == 2


def test_a_cache_that_cannot_be_written_is_reported(
    workload: Workload, ctx: DistributedContext, measured: Sequence[dict[str, Any]], tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file, not a folder")
    config, _, text = choose(workload, ctx)
    assert config.train.precision == "bf16"
    assert f"{tmp_path / 'cache' / FILE}: cannot be written to (" in text
    assert len(measured) == 1


@pytest.mark.parametrize("content", ["", "[]", "{", '{"key": 1}', '{"key": ["fp64", true, ""]}', "[" * 10_000, "\0"])
def test_a_damaged_cache_is_replaced(
    content: str, workload: Workload, ctx: DistributedContext, measured: Sequence[dict[str, Any]]
) -> None:
    file = Path(workload.config.data.cache) / FILE
    file.parent.mkdir()
    file.write_text(content)
    choose(workload, ctx)
    assert len(measured) == len(json.loads(file.read_text())) == 1


@pytest.mark.parametrize(
    ("options", "saved", "chosen", "reason"),
    [
        ({"precision": "bf16", "channels_last": True}, None, ("bf16", True), "as train.precision asks"),
        ({"precision": "fp32", "channels_last": False}, None, ("fp32", False), "as train.precision asks"),
        ({}, Execution("fp32", channels_last=False), ("fp32", False), "as at the start of this run"),
        (
            {"precision": "bf16", "channels_last": True},
            Execution("bf16", channels_last=True),
            ("bf16", True),
            "as train.p",
        ),
        ({"epochs": 14}, None, ("fp32", True), "runs of less than 256 images are not measured"),
        ({"epochs": 15}, None, ("bf16", True), "measured"),
        ({"epochs": 57}, None, BF16, "measured"),
        ({"precision": "bf16", "epochs": 56}, None, ("bf16", True), "as train.precision asks; runs of less than 1,024"),
    ],
)
def test_choice_and_reason(
    options: dict[str, Any],
    saved: Execution | None,
    chosen: tuple[str, bool],
    reason: str,
    workload: Workload,
    ctx: DistributedContext,
    measured: Sequence[dict[str, Any]],
) -> None:
    config, ctx, text = choose(workload, ctx, saved, **options)
    assert (config.train.precision, config.train.channels_last, ctx.precision) == (*chosen, chosen[0])
    assert text.partition(": ")[2].startswith(reason)
    assert len(measured) == (reason == "measured")


@pytest.mark.parametrize(
    ("trainable", "augment", "views", "cached", "cost"),
    [
        ("head", "none", None, "auto", 18 + 6),
        ("head", "none", None, "off", (18 + 6) * 100),
        ("head", "basic", 3, "auto", 18 * 3 + 6),
        ("head", "basic", None, "auto", 18 * 100 + 6),
        ("all", "none", None, "auto", (18 + 2) * 100),
    ],
)
def test_images_with_cached_features_are_computed_once(
    trainable: str, augment: str, views: int | None, cached: str, cost: int, workload: Workload
) -> None:
    config = with_options(
        workload.config,
        transfer={"trainable": trainable},
        data={"augment": augment, "views": views},
        train={"cache_features": cached},
    )
    assert replace(workload, config=config, evaluated=6).cost == cost


@pytest.mark.parametrize(("saved", "chosen"), [(None, BF16), (Execution("fp32", channels_last=True), ("fp32", True))])
def test_compared_runs_have_one_execution(
    saved: Execution | None, chosen: tuple[str, bool], workload: Workload, ctx: DistributedContext,
    measured: Sequence[dict[str, Any]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    folders = iter([None, saved])  # the second run has begun, and chose what the others take
    monkeypatch.setattr(execution, "saved_execution", lambda folder: next(folders))
    runs = {"auto": workload.config, "fp32": with_options(workload.config, train={"precision": "fp32"})}
    resolved, common = with_one_execution(runs, workload, ctx, Console(quiet=True))
    assert common == chosen
    options = {key: (config.train.precision, config.train.channels_last) for key, config in resolved.items()}
    assert options == {"auto": chosen, "fp32": ("fp32", chosen[1])}


def test_a_run_in_a_precision_that_this_device_lacks_is_refused(workload: Workload, ctx: DistributedContext) -> None:
    with pytest.raises(UserError, match=r"began in precision fp16, which cpu does not have: resume on a machine"):
        choose(workload, ctx, Execution("fp16", channels_last=True))


def test_a_real_measurement(workload: Workload, ctx: DistributedContext) -> None:
    config, _, text = choose(workload, ctx)
    assert config.train.precision in ("fp32", "bf16")
    assert text.count("channels_last") >= 1
    assert "fp32" in text
    assert "bf16" in text
