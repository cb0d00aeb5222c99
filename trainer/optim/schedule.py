"""Learning rate schedules, and the conversion of durations into steps: pure functions.

The learning rate depends on the step alone. A scheduler object would have a state that must be saved and restored.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from trainer.errors import UserError

_TIME = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(s|min|h)\s*")
_DURATION = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(steps?|epochs?|%)\s*")
_RISE, _FIRST, _LAST = 0.3, 1 / 25, 1e-4
"""one-cycle: fraction of the run until the peak, first rate over the peak, last rate over the first."""


@dataclass(frozen=True)
class Duration:
    """An amount of training: a number of steps, a number of epochs, or a percentage of the run."""

    amount: float
    unit: Literal["step", "epoch", "%"]


def parse_duration(key: str, text: str) -> Duration:
    """Parse a duration such as '100 steps', '1 epochs' or '5%'.

    Raises:
        UserError: the text is not a duration; the message names the option `key`.

    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise UserError(f"{key} is {text!r}: expected a duration, as in '100 steps', '1 epochs' or '5%'")
    amount, unit = float(match[1]), match[2].rstrip("s")
    if unit == "%" and amount > 100:
        raise UserError(f"{key} is {text!r}: expected at most 100%")
    return Duration(amount, unit)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Interval:
    """The interval between two checkpoints: an amount of training, or wall-clock time."""

    training: Duration | None = None
    seconds: float | None = None


def parse_interval(key: str, text: str) -> Interval:
    """Parse an interval such as '3 steps', '1 epoch', '10%' or '10 min'.

    Raises:
        UserError: the text is not an interval, or it is 0; the message names the option `key`.

    """
    match = _TIME.fullmatch(text)
    if match is None:
        try:
            interval = Interval(training=parse_duration(key, text))
        except UserError:
            raise UserError(
                f"{key} is {text!r}: expected an interval, as in '100 steps', '1 epoch', '10%', '10 min' or '2 h'"
            ) from None
    else:
        interval = Interval(seconds=float(match[1]) * {"s": 1, "min": 60, "h": 3600}[match[2]])
    if interval.seconds == 0 or (interval.training and interval.training.amount == 0):
        raise UserError(f"{key} is {text!r}: expected more than 0, or null")
    return interval


def to_steps(duration: Duration, *, steps_per_epoch: int, total_steps: int) -> int:
    """Return the duration in steps, rounded to the nearest integer."""
    steps_per_unit = {"step": 1.0, "epoch": float(steps_per_epoch), "%": total_steps / 100}[duration.unit]
    return round(duration.amount * steps_per_unit)


def warmup_steps(option: str, *, steps_per_epoch: int, total_steps: int) -> int:
    """Return the number of warm-up steps; `option` is optim.warmup."""
    duration = parse_duration("optim.warmup", option)
    return to_steps(duration, steps_per_epoch=steps_per_epoch, total_steps=total_steps)


def get_lr_multiplier(
    step: int, *, total_steps: int, warmup_steps: int, kind: Literal["constant", "cosine", "one-cycle"]
) -> float:
    """Return the learning rate of update `step` (counted from 0) as a fraction of the peak.

    It rises linearly over `warmup_steps` to 1. Then it is constant, or follows a half cosine that would reach 0 at
    `total_steps` (Loshchilov & Hutter 2017, SGDR, without restarts). For one-cycle see `_one_cycle`.
    """
    if kind == "one-cycle":
        return _one_cycle(step, total_steps=total_steps, rise=warmup_steps or round(_RISE * total_steps))
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if kind == "constant":
        return 1.0
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def _one_cycle(step: int, *, total_steps: int, rise: int) -> float:
    """Return the fraction of the peak by the 1cycle policy (Smith 2018; Smith & Topin 2019, super-convergence).

    The first update has 1/25 of the peak, update `rise` the peak, and the last 1e-4 of the first. Between them the rate
    follows half cosines, as in fastai and torch's OneCycleLR. Momentum is not cycled.
    """
    peak = max(0, rise - 1)
    if step <= peak:
        start, end, progress = _FIRST, 1.0, step / peak if peak else 1.0
    else:
        start, end, progress = 1.0, _FIRST * _LAST, min(1.0, (step - peak) / max(1, total_steps - 1 - peak))
    return end + (start - end) * 0.5 * (1 + math.cos(math.pi * progress))


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """The updates of a run: their number, batch sizes and learning rates."""

    batch_sizes: tuple[int, ...]
    """Number of examples in each global batch of an epoch, in order. An epoch has one step per entry."""
    epochs: int
    """Number of epochs."""
    logs_per_epoch: int
    """How often metrics are read within an epoch."""
    lr_multiplier: Callable[[int], float]
    """Step of the run, counted from 0 -> fraction of the peak learning rate."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of updates of an epoch."""
        return len(self.batch_sizes)

    @property
    def total_steps(self) -> int:
        """Return the number of updates of the run."""
        return self.steps_per_epoch * self.epochs

    @property
    def log_steps(self) -> frozenset[int]:
        """Return the steps of an epoch, counted from 1, after which metrics are read. The last step is one of them."""
        count = min(self.logs_per_epoch, self.steps_per_epoch)
        return frozenset(math.ceil(i * self.steps_per_epoch / count) for i in range(1, count + 1))
