"""What a run's report states in words: state, time, command and environment."""

import shlex
import time
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from trainer.pages.advice import data_wait
from trainer.pages.run_record import RunRecord, number


def describe_status(run: RunRecord) -> str:
    """Return the state of a run in a few words."""
    done, epochs = len(run.epochs), run.option("train.epochs")
    position = f"epoch {done} of {epochs}" if isinstance(epochs, int) else f"epoch {done}"
    if run.is_evaluated:
        early = isinstance(epochs, int) and 0 < done < epochs
        return f"finished after {position}{' (early stopping)' if early else ''}"
    latest = run.attempts[-1] if run.attempts else None
    if latest is None or latest.state == "done":
        return position
    state = "running when this page was written" if latest.state == "running" else latest.state
    return f"{position}, {state}"


@dataclass(frozen=True)
class TimePart:
    """A part of the time of a run."""

    name: str
    seconds: float
    tone: int


def time_parts(run: RunRecord) -> list[TimePart]:
    """Return where the time of a run went; empty if it is not known."""
    training = sum(number(row, "seconds") or 0.0 for row in run.epochs)
    waiting = (data_wait(run) or 0.0) * training
    head = (number(run.start, "seconds") or 0.0) if run.start is not None else 0.0
    total = sum(_attempt_seconds(attempt.began, attempt.ended) for attempt in run.attempts)
    if training <= 0:
        return []
    rest = 0.0 if run.has_phases else max(0.0, total - training - head)
    parts = (
        ("updates of the weights", training - waiting, 1),
        ("waiting for images", waiting, 2),
        ("fitting the output layer", head, 3),
        ("start, evaluation and checkpoints", rest, 6),
    )
    return [TimePart(*part) for part in parts if part[1] > 0]


def _attempt_seconds(began: str, ended: str | None) -> float:
    try:
        start = datetime.fromisoformat(began)
        end = datetime.fromisoformat(ended) if ended else datetime.fromtimestamp(time.time(), start.tzinfo)
        return max(0.0, (end - start).total_seconds())
    except (ValueError, TypeError, OverflowError):
        return 0.0


def command_line(run: RunRecord) -> str:
    """Return the command line of the latest start."""
    words = run.environment.get("argv")
    return shlex.join(map(str, words)) if isinstance(words, list) else ""


def describe_environment(run: RunRecord) -> list[tuple[str, str]]:
    """Return names and values of the environment of the latest start."""
    record = run.environment
    hosts, git, versions = (record.get(key) for key in ("hosts", "git", "versions"))
    entries: list[tuple[str, Any]] = []
    for host in hosts if isinstance(hosts, list) else ():
        if isinstance(host, dict):
            ranks, gpus = (value if isinstance(value, list) else [] for value in (host.get("ranks"), host.get("gpus")))
            entries.append(("machine", f"{host.get('host')}: {host.get('cpu')}, {host.get('usable_cores')} cores"))
            entries.append(("processes", f"{len(ranks)}, on {', '.join(map(str, gpus)) or 'the CPU'}"))
            entries.append(("system", host.get("platform")))
    if isinstance(versions, dict):
        entries.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    if isinstance(git, dict) and git.get("commit"):
        entries.append(("git commit", f"{git['commit']}{', with changes' if git.get('dirty') else ''}"))
    for attempt in run.attempts:
        reason = f" ({attempt.reason})" if attempt.reason else ""
        entries.append((f"start {attempt.attempt}", f"{attempt.began}: {attempt.state}{reason}"))
    return [(name, str(value)) for name, value in entries if value is not None]
