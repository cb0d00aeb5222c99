"""Start the trainer as its users do, in processes of its own."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
MAIN = REPOSITORY / "trainer" / "main.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def torchrun(processes: int, *program: str | Path) -> list[str]:
    options = [
        f"--nproc-per-node={processes}",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
    ]
    return [sys.executable, "-m", "torch.distributed.run", *options, *map(str, program)]


def accelerate_launch(*program: str | Path) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *map(str, program)]


def run(
    command: Sequence[str | Path],
    *,
    cwd: Path,
    code: int = 0,
    environment: Mapping[str, str] | None = None,
    timeout: float = 300,
) -> str:
    """Run a command, check its exit code, and return what it printed (standard error after standard output)."""
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **(environment or {})},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    printed = done.stdout + done.stderr
    assert done.returncode == code, f"exit code {done.returncode}, expected {code}:\n{printed}"
    return printed


def rows(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return the rows of that kind in a run folder's metrics."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row for row in map(json.loads, lines) if row["kind"] == kind]


def step_losses(folder: Path) -> list[float]:
    """Return the mean loss of each batch, from the running sums of a run with a point at every step."""
    losses: list[float] = []
    before_sum, before_seen, epoch = 0.0, 0, 0
    for row in rows(folder, "train"):
        if -(-row["epoch"] // 1) != epoch:  # a new epoch: its sums start at 0
            before_sum, before_seen, epoch = 0.0, 0, -(-row["epoch"] // 1)
        total = row["train_loss"] * row["train_seen"]
        losses.append((total - before_sum) / (row["train_seen"] - before_seen))
        before_sum, before_seen = total, row["train_seen"]
    return losses
