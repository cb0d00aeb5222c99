"""Open run folders, without the checks and the lock that `open_run` does."""

import io
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.data.preprocessing import Preprocessing
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import StopSignals
from trainer.model.metadata import ModelMetadata
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun

MODEL_METADATA = ModelMetadata(
    version="0",
    architecture="resnet18",
    classes=("a", "图"),
    preprocessing=Preprocessing(
        image_size=8, resize_size=8, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    ),
    source="",
    metrics={},
)


def make_run(folder: Path, ctx: DistributedContext | Any, lock: RunLock | None, **changes: Any) -> OpenRun:
    """Return an open run; `printed` returns what its console has printed."""
    fields: dict[str, Any] = {
        "ctx": ctx,
        "console": Console(file=io.StringIO(), width=10_000, highlight=False, markup=False),
        "signals": StopSignals(),
        "root": folder,
        "folder": folder,
        "lock": lock,
        "attempt": lock.record.attempt if lock else 1,
        "hang_timeout": None,
    }
    return OpenRun(**fields | changes)


def printed(run: OpenRun) -> str:
    assert isinstance(run.console.file, io.StringIO)
    return run.console.file.getvalue()


def stop_heartbeat(lock: RunLock) -> None:
    """End the thread of a lock, as a kill would: the attempt stays without a record of how it ended."""
    lock._ended.set()
    lock._thread.join()
