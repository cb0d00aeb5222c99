"""The progress of a run, from its metrics.jsonl and the record of its last attempt. Nothing in the files is trusted."""

import json
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

from launch.experiments import read_options
from regraft.contract import BASELINE, METRICS, PRETRAIN, AttemptRecord, read_file
from regraft.sparkline import sparkline

_MAX_METRICS_BYTES = 1 << 26
"""Of a larger metrics.jsonl, only the last rows are read."""
_CHART_WIDTH, _BAR_WIDTH = 24, 20
_TRAIN_KEYS = ("epoch", "seconds", "examples_per_sec", "train_loss")

_Row = dict[str, Any]


def progress_lines(run: Path, attempt: AttemptRecord, *, dead: bool) -> list[str]:
    """Return a few lines about the progress of a run: position, ETA, loss, accuracy, speed and learning rates.

    Args:
        run: the run folder.
        attempt: the record of its last attempt.
        dead: whether its process was probably killed.

    """
    phase, rows = _read_phase(run, attempt)
    is_running = attempt.state == "running" and not dead
    lines = [
        f"attempt {attempt.attempt}, process {attempt.pid} on {attempt.host}, started {attempt.began}",
        _position(attempt, rows) + (f" of the {phase} phase" if phase else ""),
    ]
    if is_running and attempt.steps:
        lines.append(_bar(attempt, rows))
    train = [row for row in rows if row.get("kind") in ("train", "epoch") and _has_numbers(row, _TRAIN_KEYS)]
    if train:
        losses = [row["train_loss"] for row in train]
        lines.append(f"train loss {losses[-1]:.4f} {sparkline(losses, width=_CHART_WIDTH)}")
    if train and is_running:
        lines += _speed(train[-1])
    accuracy = _accuracy(run / phase, rows)
    return lines + ([accuracy] if accuracy else [])


def progress_summary(run: Path, attempt: AttemptRecord, *, dead: bool) -> str:
    """Return the progress of a run on one line."""
    phase, rows = _read_phase(run, attempt)
    train = [row for row in rows if _has_numbers(row, ("train_loss",))]
    remaining = _remaining_seconds(attempt, rows) if attempt.state == "running" and not dead else None
    parts = [
        _position(attempt, rows) + (f" of the {phase} phase" if phase else ""),
        f"train loss {train[-1]['train_loss']:.4f}" if train else "",
        _accuracy(run / phase, rows),
        "" if remaining is None else f"ETA {format_duration(remaining)}",
    ]
    return ", ".join(filter(None, parts))


def _read_phase(run: Path, attempt: AttemptRecord) -> tuple[str, list[_Row]]:
    """Return the phase to show, and the rows of its metrics.

    When all is done, it is the fine-tuned model, and not the phase that was trained last for comparison.
    """
    phase = attempt.stage if attempt.state != "done" and attempt.stage in (PRETRAIN, BASELINE) else ""
    return phase, _read_metrics(run / phase)


def _step(attempt: AttemptRecord, rows: list[_Row]) -> int:
    """Return the last known step; metrics may be newer than the last checkpoint."""
    return max(attempt.step, rows[-1]["step"] if rows else 0)


def _position(attempt: AttemptRecord, rows: list[_Row]) -> str:
    if not attempt.steps and not rows and attempt.state == "running":
        return "before the first step: images, model and output layer are prepared"
    epoch = max([attempt.epoch, *(row["epoch"] for row in _epochs(rows))])
    return f"step {_step(attempt, rows)} of {attempt.steps or '?'}, epoch {epoch:g} of {attempt.epochs or '?'}"


def _bar(attempt: AttemptRecord, rows: list[_Row]) -> str:
    done = min(1.0, _step(attempt, rows) / attempt.steps)
    filled, remaining = round(done * _BAR_WIDTH), _remaining_seconds(attempt, rows)
    bar = "━" * filled + "┄" * (_BAR_WIDTH - filled)
    return f"{bar} {done:.0%}" + ("" if remaining is None else f", ETA {format_duration(remaining)}")


def _speed(row: _Row) -> list[str]:
    """Return a line about the speed and one about learning rates, as far as a row has them."""
    speed, others = [f"{row['examples_per_sec']:,.1f} examples/s"], []
    if _has_numbers(row, ("examples_per_sec_compute",)) and row["examples_per_sec_compute"] > 0:
        compute = row["examples_per_sec_compute"]
        wait = max(0.0, 1 - row["examples_per_sec"] / compute)
        speed.append(f"{compute:,.1f} without data loading (wait {wait:.0%})")
    rates = [(key.removeprefix("lr_"), row[key]) for key in ("lr_backbone", "lr_head") if _has_numbers(row, (key,))]
    if rates:
        others.append("learning rate " + ", ".join(f"{rate:.2g} ({group})" for group, rate in rates))
    if _has_numbers(row, ("memory_bytes",)):
        others.append(f"memory {row['memory_bytes'] / 2**30:.1f} GiB")
    return [", ".join(part) for part in (speed, others) if part]


def _accuracy(folder: Path, rows: list[_Row]) -> str:
    """Return a line about the accuracy of the last and the best epoch; an empty one before the first epoch."""
    split = "val" if any("val_accuracy" in row for row in rows) else "test"
    epochs = _epochs(rows, f"{split}_accuracy", f"{split}_loss")
    if not epochs:
        return ""
    last = epochs[-1]
    best = _best_epoch(epochs, split, select_by=read_options(folder).get("checkpoint.select_by"))
    return (
        f"{split} accuracy {last[f'{split}_accuracy']:.3f} after epoch {last['epoch']}, best "
        f"{best[f'{split}_accuracy']:.3f} after epoch {best['epoch']}"
    )


def _best_epoch(epochs: list[_Row], split: str, *, select_by: object) -> _Row:
    """Return the best epoch as the run selects it: by checkpoint.select_by, then by loss; the first of equal ones."""
    metric = {"log_loss": "loss"}.get(str(select_by), str(select_by))
    if not all(_has_numbers(row, (f"{split}_{metric}",)) for row in epochs):  # a run of an earlier version
        metric = "accuracy"
    sign = -1 if metric == "loss" else 1
    return max(epochs, key=lambda row: (sign * row[f"{split}_{metric}"], -row[f"{split}_loss"]))


def _epochs(rows: list[_Row], *keys: str) -> list[_Row]:
    return [row for row in rows if row.get("kind") == "epoch" and _has_numbers(row, (*_TRAIN_KEYS, *keys))]


def _remaining_seconds(attempt: AttemptRecord, rows: list[_Row]) -> float | None:
    """Estimate the remaining time from the last three epochs and their evaluations, or from the first steps."""
    epochs = _epochs(rows)
    evaluations = 0.0
    if epochs and epochs[-1]["epoch"] > 0 and epochs[-1]["step"] > 0:
        recent = epochs[-3:]
        steps_per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]
        seconds_per_step = sum(row["seconds"] for row in recent) / (steps_per_epoch * len(recent))
        timed = [row["evaluation_seconds"] for row in recent if _has_numbers(row, ("evaluation_seconds",))]
        if timed:
            evaluations = max(0, attempt.epochs - epochs[-1]["epoch"]) * sum(timed) / len(timed)
    else:
        first_steps = [row for row in rows if row.get("kind") == "train" and _has_numbers(row, _TRAIN_KEYS)]
        if epochs or not first_steps or first_steps[-1]["step"] <= 0:
            return None
        seconds_per_step = first_steps[-1]["seconds"] / first_steps[-1]["step"]
    return float((attempt.steps - _step(attempt, rows)) * seconds_per_step + evaluations) if attempt.steps else None


def _read_metrics(folder: Path) -> list[_Row]:
    """Return the rows of a run's metrics that have a step, without a last line that is still being written."""
    path = folder / METRICS
    try:
        status = path.stat()
        return _parse_metrics(path, status.st_mtime_ns, status.st_size)
    except OSError:
        return []


@lru_cache(maxsize=64)
def _parse_metrics(path: Path, _modified: int, _size: int) -> list[_Row]:
    """Return the rows of a file; the other arguments say whether it has changed since it was read."""
    rows = []
    for line in read_file(path, max_bytes=_MAX_METRICS_BYTES).splitlines():
        if line.startswith(b'{"kind": "classes"'):  # long, and not shown
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _has_numbers(row: _Row, keys: tuple[str, ...]) -> bool:
    return all(_is_number(row.get(key)) for key in keys)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
