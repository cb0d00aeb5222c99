"""The signal that the launcher of a run received. torchrun sends SIGTERM to the trainer for every signal."""

import re
from pathlib import Path

from regraft.contract import LOGS, STOP_SIGNAL, read_file


def write_stop_signal(logs: Path, attempt: int, name: str) -> None:
    """Record in a launch's log folder that a signal has stopped an attempt."""
    if logs.is_dir():
        (logs / STOP_SIGNAL).write_text(f"{attempt} {name}\n", encoding="ascii")


def read_stop_signal(run: Path, attempt: int) -> str | None:
    """Return the signal that stopped an attempt of a run, None if no launcher has recorded one."""
    for path in sorted((run / LOGS).glob(f"*/{STOP_SIGNAL}"), reverse=True):
        try:
            recorded = re.fullmatch(r"([0-9]+) (SIG[A-Z0-9]+)\n", read_file(path, max_bytes=100).decode("ascii"))
        except (OSError, ValueError):
            continue
        if recorded is not None and recorded[1] == str(attempt):
            return recorded[2]
    return None
