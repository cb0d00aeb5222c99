import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from tests.trainer.checkpoint.checkpoints import METADATA, NEWER, OLDER, write
from tests.trainer.checkpoint.managed import AVERAGE, EVERY_EPOCH, STEPS, Log, Make, Training
from tests.trainer.runs import MODEL_METADATA, make_run, stop_heartbeat
from trainer.checkpoint import manager as manager_module
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.distributed.context import DistributedContext
from trainer.evaluate import SelectBy
from trainer.optim.ema import ModelEma
from trainer.optim.schedule import TrainSchedule
from trainer.run.lock import RunLock
from trainer.state import TrainState


@pytest.fixture(autouse=True)
def _fast_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """Flush nothing to the disk: no test cuts the power."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return the path of a run's checkpoints, which does not exist yet."""
    (tmp_path / "run").mkdir()
    return tmp_path / "run" / "checkpoints"


@pytest.fixture
def newer(folder: Path) -> Path:
    """Return the newer of two checkpoints, to be damaged."""
    write(folder, OLDER, NEWER)
    return folder / NEWER.name


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the manager's clock, which a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.fixture
def make(tmp_path: Path, clock: SimpleNamespace, ctx: DistributedContext) -> Iterator[Make]:
    locks: list[RunLock] = []

    def make(
        retention: RetentionPolicy = EVERY_EPOCH,
        *,
        is_writer: bool = True,
        epochs: int = 4,
        split: str | None = None,
        patience: int | None = None,
        select_by: SelectBy = "accuracy",
        ema: bool = False,
        **position: Any,
    ) -> Training:
        if is_writer:
            for lock in locks:
                lock.end("failed")
            locks.append(RunLock.acquire(tmp_path, log=print))
        run = make_run(tmp_path, ctx, locks[-1] if is_writer else None)
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        model(torch.zeros(2, 3, 1, 1)).sum().backward()
        optimizer.step()
        state = TrainState(model=model, optimizer=optimizer, ema=ModelEma(model, 0.9 if ema else None), **position)
        if ema:
            for parameter in state.ema.model.parameters():
                parameter.data.fill_(AVERAGE)
        early_stopping, log = EarlyStopping(split=split, patience=patience, select_by=select_by), Log()
        saver = CheckpointSaver(
            run,
            retention=retention,
            metadata=dataclasses.replace(METADATA, steps_per_epoch=STEPS),
            model_metadata=MODEL_METADATA,
            selected_on=early_stopping.selected_on,
            order_digest=lambda epoch: f"order of epoch {epoch}",
        )
        schedule = TrainSchedule(batch_sizes=(4, 3), epochs=epochs, logs_per_epoch=1, lr_multiplier=lambda step: 1.0)
        manager = CheckpointManager(
            run, state, schedule, saver=saver, retention=retention, early_stopping=early_stopping, logger=log
        )
        return Training(run, state, log, saver, manager)

    yield make
    for lock in locks:
        stop_heartbeat(lock)
