"""Learning-rate range test (Smith 2017, Cyclical learning rates, section 3.3): its rates, and a suggestion.

These are pure functions; range_test.py makes the updates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.8
"""Decay of the moving average of the losses. A higher one (fastai: 0.98) lags by half a decade of rates or more."""
DIVERGED = 4.0
"""The test ends if the smoothed loss exceeds its best value so far by this factor."""
_PAST_MINIMUM = 1.5
"""Losses count until the smoothed loss exceeds its best value so far by this factor.

A loss that exploded may fall again, to that of a model that has forgotten everything.
"""
_SAFETY = 3.0
"""Factor between the rate at the minimum and the highest safe rate: closer to the minimum, the loss may explode."""
_MAX_FALL = 0.95
"""Ratio of the lowest smoothed loss to that at the start above which the loss does not fall at any rate."""
_NOISE_LOSSES = 20
"""Number of losses, at the lowest rates, that show how much the batches differ from each other."""
_NOISES = 4.0
"""A rise of the smoothed loss by fewer standard deviations of the batches may be noise."""


def rates(lowest: float, highest: float, steps: int) -> list[float]:
    """Return `steps` learning rates in geometric sequence, both ends included."""
    return [float(rate) for rate in np.geomspace(lowest, highest, steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average after each loss, with bias correction (Kingma & Ba 2015)."""
    averages: list[float] = []
    average = 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        averages.append(average / (1 - SMOOTHING**count))
    return averages


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the last loss is not finite, or the smoothed loss is far above its best value.

    With very few images, the batches differ by more than the factor `DIVERGED` without any update.
    """
    if not math.isfinite(losses[-1]):
        return True
    averages = smoothed(losses)
    best = min(averages)
    return averages[-1] > max(DIVERGED * best, best + _NOISES * batch_noise(losses[:-1]))


def batch_noise(losses: Sequence[float]) -> float:
    """Return the standard deviation of the first batch losses, from their successive differences.

    Of independent normal values, the mean absolute difference is 2 / sqrt(pi) standard deviations. A trend hardly
    affects it (von Neumann et al. 1941, The mean square successive difference).
    """
    differences = np.abs(np.diff(losses[:_NOISE_LOSSES]))
    return float(differences.mean() * math.sqrt(math.pi) / 2) if len(differences) else 0.0


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """Learning rates that a range test suggests, as `optim.lr`."""

    lr: float | None
    """Suggested learning rate: the larger of `steepest` and `tenth`; None if the loss did not fall."""
    steepest: float | None
    """Rate at which the smoothed loss falls fastest over the log of the rate, at most a third of the minimum's."""
    tenth: float | None
    """A tenth of the rate at the minimum of the smoothed loss."""
    reason: str


def suggest(tried: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return the suggested learning rate for the rates that were tried and the finite loss before each update.

    With uneven batches, the loss may fall fastest long before its minimum. Close to the minimum, the next update may
    explode. The suggestion is therefore between a tenth and a third of the rate at the minimum.
    """
    noise = batch_noise(losses)
    # The first averages are of few losses: one of them may be the lowest by chance.
    first = min(10, len(losses) // 4)
    averages = _before_turn(smoothed(losses), first, noise)
    lowest = first + int(np.argmin(averages[first:])) if averages[first:] else 0
    start = float(np.mean(losses[: first + 1])) if averages else 0.0
    # The moving average has the variance of a mean of 9 losses, `start` that of a mean of `first + 1`.
    least_fall = 3 * noise * math.sqrt((1 - SMOOTHING) / (1 + SMOOTHING) + 1 / (first + 1))
    if not averages[first:] or averages[lowest] > min(_MAX_FALL * start, start - least_fall):
        return Suggestion(
            lr=None,
            steepest=None,
            tenth=None,
            reason="the loss does not fall at any rate by more than a twentieth, and by more than the batches differ "
            f"(standard deviation {noise:.2g}): try other rates (--from, --to), more --steps, a larger "
            "train.batch_size, or check whether the model can overfit one batch (regraft debug)",
        )
    tenth = tried[lowest] / 10
    slopes = list(_slopes(tried[: lowest + 1], averages[: lowest + 1]))
    safe = [i for i in range(lowest + 1) if tried[i] <= tried[lowest] / _SAFETY] or [0]
    steepest = tried[min(safe, key=slopes.__getitem__)]
    if steepest >= tenth:
        reason = "the loss falls fastest at this rate, which is at most a third of the rate at the minimum"
    else:
        reason = "a tenth of the rate at the minimum; the loss falls fastest at a lower rate"
    return Suggestion(lr=max(steepest, tenth), steepest=steepest, tenth=tenth, reason=reason)


def _before_turn(averages: list[float], first: int, noise: float) -> list[float]:
    best = math.inf
    for i, average in enumerate(averages[first:], start=first):
        if average > max(_PAST_MINIMUM * best, best + noise):
            return averages[:i]
        best = min(best, average)
    return averages


def _slopes(tried: Sequence[float], averages: Sequence[float]) -> Iterator[float]:
    """Yield the slope [loss per decade] at each rate: of a linear fit to the losses within half a decade."""
    logs = np.log10(tried)
    for i, log in enumerate(logs):
        near = np.abs(logs - log) <= 0.5
        near[max(0, i - 1) : i + 2] = True
        x, y = logs[near], np.asarray(averages)[near]
        spread = ((x - x.mean()) ** 2).sum()
        yield float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
