"""The axes of a chart: round numbers as ticks, and positions of values."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """Map of values to positions; values outside of the axis are at its ends."""

    low: float
    high: float
    start: float
    end: float
    ticks: Sequence[float]
    is_log: bool = False

    def __call__(self, value: float) -> float:
        """Return the position of a value."""
        value = min(max(value, self.low), self.high)
        low, high, value = (math.log10(entry) if self.is_log else entry for entry in (self.low, self.high, value))
        return round(self.start + (value - low) / (high - low) * (self.end - self.start), 1)


def make_axis(
    values: Sequence[float],
    limits: tuple[float | None, float | None],
    ends: tuple[float, float],
    *,
    is_log: bool = False,
) -> Axis:
    """Return an axis that holds the values. It ends at its limits, or at round numbers where a limit is None."""
    low, high = min(values), max(values)
    low, high = (low if limits[0] is None else limits[0]), (high if limits[1] is None else limits[1])
    ticks = _log_ticks(low, high) if is_log else _ticks(low, high, 5)
    low, high = (ticks[0] if limits[0] is None else low), (ticks[-1] if limits[1] is None else high)
    return Axis(low, high, *ends, [value for value in ticks if low <= value <= high], is_log)


def _ticks(low: float, high: float, count: int) -> list[float]:
    """Return about `count` round numbers from `low` or below to `high` or above."""
    span = (high - low) or abs(high) or 1.0
    raw = span / count
    magnitude = 10 ** math.floor(math.log10(raw))
    step = next(factor * magnitude for factor in (1, 2, 2.5, 5, 10) if factor * magnitude >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(number * step, 12) for number in range(first, max(last, first + 1) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    return [10.0**power for power in range(first, max(last, first + 1) + 1)]
