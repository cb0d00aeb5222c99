"""Start the trainer as users do, in processes of its own."""

import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from regraft.contract import AttemptRecord

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = REPOSITORY / "trainer" / "main.py"


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def torchrun(nproc: int, *program: str | Path) -> list[str]:
    """Return the command of torchrun with `nproc` processes; `program` starts with further options of torchrun."""
    endpoint = f"--rdzv-endpoint=127.0.0.1:{free_port()}"
    launcher = ["torch.distributed.run", f"--nproc-per-node={nproc}", "--rdzv-backend=c10d", endpoint]
    return [sys.executable, "-m", *launcher, *map(str, program)]


def accelerate_launch(*program: object) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, program)]


def command_line(defaults: Mapping[str, object], changes: Mapping[str, object]) -> list[str]:
    """Return the trainer's options; in the names of changed ones, double underscores stand for dots."""
    options = {**defaults, **{key.replace("__", "."): value for key, value in changes.items()}}
    return [f"--{key}={value}" for key, value in options.items()]


def run(
    command: Sequence[object],
    *,
    cwd: Path,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """Run a command, check its exit code, and return its standard output followed by its standard error."""
    words = [str(word) for word in command]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})}
    done = subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout, check=False)
    output = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{output}"
    return output


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that `make` fills, once per test session: workers of pytest-xdist share it."""
    base = factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "shared" / name
    folder.parent.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        done = folder / ".done"
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a worker that failed
            folder.mkdir()
            make(folder)
            done.touch()
    return folder


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of one kind in a run folder's metrics.jsonl."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def attempt(number: int, state: Any, **fields: Any) -> AttemptRecord:
    """Return the record of a start that did not happen on this machine."""
    process = {"host": "node7", "pid": 100 + number, "started": 1, "pid_namespace": "boot pid:[1]", "lease_id": "x"}
    began = f"2026-11-24T12:00:{number % 60:02}+00:00"
    return AttemptRecord(**{"attempt": number, "state": state, "steps": 100, "began": began, **process, **fields})


def wait_until(condition: Callable[[], object], *, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)
