"""The learning-rate range test (Smith 2017, Cyclical learning rates, section 3.3): its rates, and what its losses say.

Pure functions; lr_find.py makes the updates.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

SMOOTHING = 0.8
"""Decay of the moving average of the losses. More of it (fastai has 0.98) lags by half a decade of rates and more."""
DIVERGED = 4.0
"""A smoothed loss above this many times the best so far ends the test."""
_TURNED = 1.5
"""A smoothed loss above this many times the best so far has passed the minimum that counts: what explodes once may fall
again, to the loss of a model that has forgotten everything."""
_MARGIN = 3.0
"""How far below the rate at the minimum a rate is held safe: right before it, the next batch may explode."""
_FALLS = 0.95
"""The least smoothed loss over the first one, above which no rate has taught the model anything."""


def rates(lowest: float, highest: float, steps: int) -> list[float]:
    """Return `steps` learning rates in geometric sequence, both ends included."""
    return [float(rate) for rate in np.geomspace(lowest, highest, steps)]


def smoothed(losses: Sequence[float]) -> list[float]:
    """Return the exponential moving average after each loss, its bias towards 0 corrected (Kingma & Ba 2015)."""
    found: list[float] = []
    average = 0.0
    for count, loss in enumerate(losses, start=1):
        average = SMOOTHING * average + (1 - SMOOTHING) * loss
        found.append(average / (1 - SMOOTHING**count))
    return found


def has_diverged(losses: Sequence[float]) -> bool:
    """Return whether the test ends with the last of these losses: it is not finite, or far above the best."""
    if not math.isfinite(losses[-1]):
        return True
    averages = smoothed(losses)
    return averages[-1] > DIVERGED * min(averages)


@dataclass(frozen=True, kw_only=True)
class Suggestion:
    """What a range test says; rates in the units of `optim.lr`."""

    lr: float | None
    """The larger of the two below; None: the loss fell nowhere."""
    steepest: float | None
    """Where the smoothed loss falls fastest over the log of the rate, up to a third of the rate at its minimum."""
    tenth: float | None
    """A tenth of the rate at which the smoothed loss is lowest."""
    why: str


def suggest(tried: Sequence[float], losses: Sequence[float]) -> Suggestion:
    """Return the learning rate to train with, from the rates tried and the (finite) losses before each update.

    The loss may fall fastest long before the minimum, where the batches are uneven, and right before it, where the
    next update may explode: a tenth of the minimum's rate is the least that is suggested, a third the most.
    """
    averages = _before_turn(smoothed(losses))
    lowest = int(np.argmin(averages)) if averages else 0
    if not averages or averages[lowest] > _FALLS * averages[0]:
        return Suggestion(
            lr=None,
            steepest=None,
            tenth=None,
            why="the loss falls at none of these rates by more than a twentieth: try other ones (--from, --to), more "
            "--steps, or see whether a batch can be learnt at all (regraft debug)",
        )
    tenth = tried[lowest] / 10
    slopes = list(_slopes(tried[: lowest + 1], averages[: lowest + 1]))
    safe = [i for i in range(lowest + 1) if tried[i] <= tried[lowest] / _MARGIN] or [0]
    steepest = tried[min(safe, key=slopes.__getitem__)]
    if steepest >= tenth:
        why = "where the loss falls fastest, a third of the rate at its minimum or less"
    else:
        why = "a tenth of the rate at the lowest loss: where it falls fastest lies lower still"
    return Suggestion(lr=max(steepest, tenth), steepest=steepest, tenth=tenth, why=why)


def _before_turn(averages: list[float]) -> list[float]:
    best = math.inf
    for i, average in enumerate(averages):
        if average > _TURNED * best:
            return averages[:i]
        best = min(best, average)
    return averages


def _slopes(tried: Sequence[float], averages: Sequence[float]) -> Iterator[float]:
    """Yield the slope at each rate [loss per decade]: of the line through its neighbours within half a one."""
    places = np.log10(tried)
    for place, (i, _) in zip(places, enumerate(averages), strict=True):
        near = np.abs(places - place) <= 0.5
        near[max(0, i - 1) : i + 2] = True
        x, y = places[near], np.asarray(averages)[near]
        spread = ((x - x.mean()) ** 2).sum()
        yield float(((x - x.mean()) * (y - y.mean())).sum() / spread) if spread > 0 else 0.0
