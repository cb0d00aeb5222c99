"""Records of attempts and logs of failures, as the trainer and torchrun write them."""

import json
from pathlib import Path
from typing import Any

from regraft.contract import AttemptRecord

TORCHRUN_REPORT = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer/main.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_12:00:01
  host      : vm
  rank      : {rank} (local_rank: 1)
  exitcode  : {code} (pid: 12)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 12
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_12:00:01
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


def attempt(number: int, state: str, *, step: int = 0, reason: str | None = None, stage: str = "") -> AttemptRecord:
    return AttemptRecord(
        attempt=number,
        state=state,
        reason=reason,
        stage=stage,
        step=step,
        steps=100,
        epoch=0,
        epochs=5,
        began=f"2026-01-01T00:00:{number:02}",
        ended=None,
        host="node1",
        pid=100 + number,
        started=0,
        pid_namespace="boot pid:[1]",
        lease_id="0",
    )


def executable(path: Path, script: str) -> Path:
    """Write a shell script that can be executed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o700)
    return path


def record(**changes: Any) -> dict[str, Any]:
    """Return the record of an attempt in the middle of a run of 10 epochs with 20 steps each."""
    return {
        "attempt": 3,
        "state": "running",
        "reason": None,
        "stage": "",
        "step": 40,
        "steps": 200,
        "epoch": 2,
        "epochs": 10,
        "began": "2026-11-24T12:00:00+00:00",
        "ended": None,
        "host": "node7",
        "pid": 4711,
        "started": 1,
        "launcher": None,
        "pid_namespace": "boot pid:[1]",
        "lease_id": "x",
    } | changes
