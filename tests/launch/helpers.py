"""Logs of failures as the trainer and torchrun write them, shell scripts, and processes that a test has marked."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

TORCHRUN_REPORT = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer/main.py FAILED
------------------------------------------------------------
Failures:
[1]:
  host      : vm
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 12)
  error_file: <N/A>
Root Cause (first observed failure):
[0]:
  host      : vm
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: x
============================================================
"""


def write_failure(
    logs: Path, rank: int, *, message: str = "", time: float = 0.0, lines: str = "", restart: int = 0
) -> None:
    """Write the log of a rank and, with a message, its error file."""
    folder = logs / "id_abc" / f"attempt_{restart}" / str(rank)
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text(lines)
    if message:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(time)}}}
        (folder / "error.json").write_text(json.dumps(content))


def write_report(logs: Path, *, code: int, rank: int = 1) -> None:
    """Write torchrun's log, with the exit code of the process with local rank 1."""
    (logs / "torchrun.log").write_text(TORCHRUN_REPORT.format(code=code, rank=rank))


def executable(path: Path, script: str) -> Path:
    """Write a shell script that can be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


@contextmanager
def restored_handlers(*numbers: int) -> Iterator[None]:
    """Restore the handlers of these signals at the end of a block."""
    handlers = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def marked_processes(mark: str) -> list[int]:
    """Return the processes with this text in their environment."""
    pids = []
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (path / "environ").read_bytes():
                pids.append(int(path.name))
    return pids
