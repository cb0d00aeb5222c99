"""Train one phase in this process, rewind its run folder as a kill leaves it, and compare run folders."""

import io
import shutil
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from safetensors.torch import load_file

from regraft.contract import ATTEMPTS, CHECKPOINTS, CONFIG
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.config.parse import dump
from trainer.config.resolve import ResolvedConfig
from trainer.config.schema import Config
from trainer.distributed.context import init_distributed
from trainer.distributed.signals import StopSignals
from trainer.report.metrics import Row, read_rows
from trainer.report.summary import TrainResult
from trainer.run.session import OpenRun, open_run
from trainer.train_run import train_run

TIMES = ("seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes")
_ConfigT = TypeVar("_ConfigT", bound=Config)


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
    return [
        {key: value for key, value in row.items() if key not in TIMES}
        for row in read_rows(Path(config.run.dir))
        if kind in (None, row["kind"])
    ]


def contents(config: Config) -> dict[str, bytes]:
    """Return the files of a run folder, without the config (it holds run.dir) and what each start records."""
    folder = Path(config.run.dir)
    per_start = {CONFIG, ATTEMPTS, "environment"}
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.relative_to(folder).parts[0] not in per_start
    }


def assert_equal_runs(one: Config, other: Config) -> None:
    """Check that two finished runs are equal bit for bit: weights, moments, metrics, and the tensors of every file."""
    folders = [Path(config.run.dir) for config in (one, other)]
    last = [folder / CHECKPOINTS / store.list_checkpoints(folder / CHECKPOINTS)[0].name for folder in folders]
    for a, b in (folders, last):
        names = {path.name for path in a.glob("*.safetensors")}
        assert names == {path.name for path in b.glob("*.safetensors")}
        for name in names:
            first, second = load_file(a / name), load_file(b / name)
            assert first.keys() == second.keys()
            differing = [key for key in first if not torch.equal(first[key], second[key])]
            assert not differing, f"{a / name}: {differing}"
    assert rows(one) == rows(other)
