"""Train one phase in this process, rewind its run folder as a kill leaves it, and compare run folders."""

import io
import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console

from regraft.contract import ATTEMPTS, CHECKPOINTS, CONFIG
from tests.folders import image_folder
from tests.runs import assert_equal_results, metrics_rows
from tests.trainer.checkpoint.checkpoints import contents as files_below
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.config.parse import dump
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.distributed.context import init_distributed
from trainer.distributed.signals import StopSignals
from trainer.report.metrics import Row
from trainer.report.summary import TrainResult
from trainer.run.session import OpenRun, open_run
from trainer.train_run import train_run

_ConfigT = TypeVar("_ConfigT", bound=Config)


EPOCHS, STEPS = 3, 2
"""Epochs of `small_config`, and updates of an epoch."""


def small_config(folder: Path) -> ResolvedConfig:
    """Return the config of a run in `folder/run`: 5 images of one class and 2 of the other make 2 steps per epoch."""
    splits = {"train": {"a": 5, "b": 2}, "val": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}}
    return resolve(
        with_options(
            Config(),
            run={"dir": str(folder / "run"), "device": "cpu", "audit": True},
            data={
                "root": str(image_folder(folder / "images", splits)), "image_size": 32, "num_workers": 0,
                "random_erasing": 1.0, "sampling": "balanced",
            },
            model={"name": "squeezenet1_1", "weights": None},
            optim={"lr": 0.02, "head_lr_scale": 1.0, "schedule": "constant"},
            train={"epochs": EPOCHS, "batch_size": 4, "precision": "fp32", "logs_per_epoch": 2},
            checkpoint={"every": "1 steps", "keep_last": 100},
        )
    )  # fmt: skip


def train(config: ResolvedConfig, *, before: Callable[[OpenRun], object] = lambda run: None) -> tuple[TrainResult, str]:
    """Run one phase as the pipeline does, on the CPU in fp32; return its result, and what it printed.

    `before` is called when the run folder is open.
    """
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    ctx = init_distributed(device="cpu", precision="fp32", threads=1)
    opened = open_run(
        Path(config.run.dir), dump(config), resume=config.run.resume, ctx=ctx, console=console,
        signals=StopSignals(), hang_timeout=config.run.hang_timeout,
    )  # fmt: skip
    run = opened.start_phase("", epochs=config.train.epochs)
    before(run)
    try:
        result = train_run(config, run, weights=config.model.weights)
    except BaseException as error:
        run.end_with_error(error)
        raise
    run.end("done")
    return result, console.file.getvalue()  # type: ignore[attr-defined]


def with_options(config: _ConfigT, **sections: Mapping[str, Any]) -> _ConfigT:
    """Return a config with other options, given by section."""
    return replace(config, **{name: replace(getattr(config, name), **options) for name, options in sections.items()})


def in_folder(config: _ConfigT, folder: Path) -> _ConfigT:
    return with_options(config, run={"dir": str(folder)})


def copy_run(config: _ConfigT, folder: Path) -> _ConfigT:
    """Copy a run to a folder, and return its config there."""
    shutil.copytree(config.run.dir, folder)
    return in_folder(config, folder)


def rewind(config: Config, step: int, epoch: int) -> None:
    """Remove all checkpoints after a position, as if the run had been killed there."""
    folder, last = Path(config.run.dir) / CHECKPOINTS, CheckpointId(step, epoch)
    for checkpoint in store.list_checkpoints(folder):
        if checkpoint > last:
            shutil.rmtree(folder / checkpoint.name)
    (folder / store.LATEST).write_text(last.name + "\n")
    assert store.list_checkpoints(folder)[0] == last


def rows(config: Config, kind: str | None = None) -> list[Row]:
    """Return the rows of a run's metrics without times, by default of all kinds."""
    return [row for row in metrics_rows(Path(config.run.dir)) if kind in (None, row["kind"])]


def audit_rows(config: Config) -> list[dict[str, Any]]:
    path = Path(config.run.dir) / "audit" / "rank-0.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def contents(config: Config) -> dict[str, bytes]:
    """Return the files of a run folder, without the config (it holds run.dir) and what each start records."""
    per_start = (CONFIG, ATTEMPTS, "environment")
    files = files_below(Path(config.run.dir))
    return {name: content for name, content in files.items() if not name.startswith(per_start)}


def assert_equal_runs(one: Config, other: Config) -> None:
    """Check that two finished runs are equal bit for bit: weights, moments, metrics, and the tensors of every file."""
    assert_equal_results(Path(one.run.dir), Path(other.run.dir))
