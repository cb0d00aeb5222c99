"""Line and column charts as inline SVG, with colors from the style of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from trainer.pages.render import render_markup

WIDTH, HEIGHT = 400.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 10.0, 38.0
_MAX_POINTS = 400


@dataclass(frozen=True, kw_only=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    tone: int = 1
    """Color of the palette, from 1 to 6; each has its own dashes, so that the color alone carries no meaning."""


@dataclass(frozen=True)
class Column:
    """One column of a chart."""

    label: str
    value: float
    tooltip: str = ""
    tone: int = 1


@dataclass(frozen=True)
class _Tick:
    position: float
    label: str


@dataclass(frozen=True)
class _Line:
    name: str
    tone: int
    path: str
    points: Sequence[tuple[float, float, str]]


@dataclass(frozen=True)
class _Bar:
    x: float
    y: float
    width: float
    height: float
    tone: int
    tooltip: str


@dataclass(frozen=True)
class _Axis:
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


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    y_log: bool = False,
    y_format: Callable[[float], str] | None = None,
    diagonal: bool = False,
) -> Markup | None:
    """Return a chart of lines as a `<figure>`; None without points. Points that are not finite are left out.

    Args:
        title: heading of the figure.
        series: the lines.
        x_label: label of the horizontal axis.
        y_range: lowest and highest value of the vertical axis; None takes it from the points.
        y_log: whether the vertical axis is logarithmic; values of 0 and below are left out.
        y_format: text of a value; by default a short number.
        diagonal: whether to draw a line from the lower left to the upper right corner.

    """
    text = y_format or format_number
    kept = [(entry, _finite(entry, positive=y_log)) for entry in series]
    kept = [(entry, points) for entry, points in kept if points]
    if not kept:
        return None
    x_axis = _make_axis([x for _, points in kept for x, _ in points], (None, None), (_LEFT, WIDTH - _RIGHT))
    y_axis = _make_axis([y for _, points in kept for _, y in points], y_range, (HEIGHT - _BOTTOM, _TOP), is_log=y_log)
    lines = []
    for entry, points in kept:
        thin = _thin(points)
        placed = [(x_axis(x), y_axis(y)) for x, y in thin]
        tips = [f"{entry.name}: {text(y)} at {x_label} {format_number(x)}" for x, y in thin]
        dots = [(x, y, tip) for (x, y), tip in zip(placed, tips, strict=True)]
        lines.append(_Line(entry.name, entry.tone, "M" + "L".join(f"{x:g} {y:g}" for x, y in placed), dots))
    last = "; ".join(f"{entry.name} from {text(points[0][1])} to {text(points[-1][1])}" for entry, points in kept)
    return render_markup(
        "chart.html.jinja",
        title=title,
        description=f"{title} over {x_label}: {last}",
        x_label=x_label,
        x_ticks=[_Tick(x_axis(value), format_number(value)) for value in x_axis.ticks],
        y_ticks=[_Tick(y_axis(value), text(value)) for value in y_axis.ticks],
        lines=lines,
        bars=[],
        diagonal=(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, _TOP) if diagonal else None,
        frame=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        size=(WIDTH, HEIGHT),
    )


def column_chart(
    title: str,
    columns: Sequence[Column],
    *,
    x_label: str,
    y_max: float | None = None,
    y_format: Callable[[float], str] | None = None,
    diagonal: bool = False,
    max_labels: int = 8,
) -> Markup | None:
    """Return a chart of columns, such as a histogram, as a `<figure>`; None without columns.

    Args:
        title: heading of the figure.
        columns: from left to right.
        x_label: label of the horizontal axis.
        y_max: highest value of the vertical axis, which begins at 0; None takes it from the columns.
        y_format: text of a value; by default a short number.
        diagonal: whether to draw a line from the lower left to the upper right corner.
        max_labels: number of columns that are labeled, at most.

    """
    if not columns:
        return None
    text = y_format or format_number
    y_axis = _make_axis([column.value for column in columns], (0, y_max), (HEIGHT - _BOTTOM, _TOP))
    step = (WIDTH - _LEFT - _RIGHT) / len(columns)
    gap = min(3.0, 0.15 * step)
    bars = []
    for number, column in enumerate(columns):
        top = y_axis(column.value)
        bars.append(
            _Bar(
                round(_LEFT + number * step + gap / 2, 1), top, round(step - gap, 1), round(HEIGHT - _BOTTOM - top, 1),
                column.tone, column.tooltip or f"{column.label}: {text(column.value)}",
            )
        )  # fmt: skip
    every = math.ceil(len(columns) / max_labels)
    labeled = [(number, column) for number, column in enumerate(columns) if number % every == 0]
    highest = max(columns, key=lambda column: column.value)
    return render_markup(
        "chart.html.jinja",
        title=title,
        description=f"{title} over {x_label}; the highest column is {text(highest.value)} at {highest.label}",
        x_label=x_label,
        x_ticks=[_Tick(round(_LEFT + (number + 0.5) * step, 1), column.label) for number, column in labeled],
        y_ticks=[_Tick(y_axis(value), text(value)) for value in y_axis.ticks],
        lines=[],
        bars=bars,
        diagonal=(_LEFT, HEIGHT - _BOTTOM, WIDTH - _RIGHT, _TOP) if diagonal else None,
        frame=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        size=(WIDTH, HEIGHT),
    )


def format_number(value: float) -> str:
    """Return a short number for an axis: 12k, 0.25, 1e-05."""
    if value and (abs(value) < 1e-3 or abs(value) >= 1e6):
        return f"{value:.2g}"
    if abs(value) >= 10_000:
        return f"{value / 1000:.4g}k"
    return f"{value:.4g}"


def _finite(series: Series, *, positive: bool) -> list[tuple[float, float]]:
    return [
        (x, y) for x, y in series.points if math.isfinite(x) and math.isfinite(y) and (y > 0 or not positive)
    ]  # fmt: skip


def _thin(points: Sequence[tuple[float, float]]) -> Sequence[tuple[float, float]]:
    """Return every n-th point, and the last one, so that a long run has a small chart."""
    every = math.ceil(len(points) / _MAX_POINTS)
    return points if every == 1 else [*points[:-1:every], points[-1]]


def _make_axis(
    values: Sequence[float],
    limits: tuple[float | None, float | None],
    ends: tuple[float, float],
    *,
    is_log: bool = False,
) -> _Axis:
    """Return an axis that holds the values. It ends at its limits, or at round numbers where a limit is None."""
    low, high = min(values), max(values)
    low, high = (low if limits[0] is None else limits[0]), (high if limits[1] is None else limits[1])
    ticks = _log_ticks(low, high) if is_log else _ticks(low, high, 5)
    low, high = (ticks[0] if limits[0] is None else low), (ticks[-1] if limits[1] is None else high)
    return _Axis(low, high, *ends, [value for value in ticks if low <= value <= high], is_log)


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
