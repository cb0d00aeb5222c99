"""Where the time of a run went."""

import math
from dataclasses import dataclass
from datetime import datetime

from regraft.contract import AttemptRecord, last_heartbeat
from trainer.pages.run_files import number
from trainer.pages.run_record import RunRecord

_SECONDS_TO_IMPORT = 6.0
"""Time in which the command imports torch and grad-cam, and loads the model."""


@dataclass(frozen=True)
class TimePart:
    """A part of the time of a run."""

    name: str
    seconds: float
    fraction: float
    """Of the whole time."""
    tone: int
    """Color of the palette."""


def time_parts(run: RunRecord) -> list[TimePart]:
    """Return where the time of a run went; empty before the first epoch.

    Training and evaluation are those of the epochs in metrics.jsonl. With several phases (pretraining, baseline), the
    starts of the run do not tell the time of one of them, so that the rest is left out.
    """
    training = _sum(run, "seconds")
    if training <= 0:
        return []
    waiting = (data_wait(run) or 0.0) * training
    evaluation = _sum(run, "evaluation_seconds")
    head = (number(run.start, "seconds") or 0.0) if run.start is not None else 0.0
    start_up = rest = 0.0
    if not run.has_phases:
        start_up = max(0.0, sum(_start_up(attempt) for attempt in run.attempts) - head)
        total = sum(_seconds(run, attempt) for attempt in run.attempts)
        rest = max(0.0, total - training - evaluation - head - start_up)
    parts = (
        ("updates of the weights", training - waiting, 1),
        ("waiting for images", waiting, 2),
        ("evaluation after the epochs", evaluation, 4),
        ("fitting the output layer", head, 3),
        ("start: images, model, precision", start_up, 5),
        ("checkpoints, final evaluation, report", rest, 6),
    )
    total = sum(seconds for _, seconds, _ in parts)
    return [TimePart(name, seconds, seconds / total, tone) for name, seconds, tone in parts if seconds > 0]


def data_wait(run: RunRecord) -> float | None:
    """Return the fraction of the training time in which the model waited for images; None if it is not known."""
    training = waiting = 0.0
    for row in run.epochs:
        seconds, seen, rate = (number(row, key) for key in ("seconds", "train_seen", "examples_per_sec_compute"))
        if seconds and seen and rate:
            training += seconds
            waiting += max(0.0, seconds - seen / rate)
    return waiting / training if training else None


def grad_cam_seconds(run: RunRecord, pictures: int) -> int | None:
    """Estimate the time in which `regraft report` draws Grad-CAM on the machine of the run; None if it cannot.

    A picture takes about as long as in training: forward and backward.
    """
    rate = number(run.epochs[-1], "examples_per_sec_compute") if run.epochs else None
    if run.model is None or not rate:
        return None
    return math.ceil(_SECONDS_TO_IMPORT + pictures / rate)


def _sum(run: RunRecord, key: str) -> float:
    return sum(number(row, key) or 0.0 for row in run.epochs)


def _start_up(attempt: AttemptRecord) -> float:
    """Return the time from the start to the first update; 0 if it is not known."""
    began, ready = _timestamp(attempt.began), _timestamp(attempt.training_began)
    return max(0.0, ready - began) if began is not None and ready is not None else 0.0


def _seconds(run: RunRecord, attempt: AttemptRecord) -> float:
    """Return the time from a start to its end; of one that goes on or was killed, to its last heartbeat."""
    began, ended = _timestamp(attempt.began), _timestamp(attempt.ended)
    if ended is None:
        ended = last_heartbeat(run.root, attempt.attempt)
    return max(0.0, ended - began) if began is not None and ended is not None else 0.0


def _timestamp(text: str | None) -> float | None:
    try:
        return None if text is None else datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        return None
