"""Line, column and bubble charts as inline SVG, with colors from the style of the page."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from trainer.pages.axis import make_axis
from trainer.pages.render import render_markup

WIDTH, HEIGHT = 400.0, 236.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 10.0, 38.0
_MAX_POINTS = 400
_MAX_RADIUS = 13.0


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


@dataclass(frozen=True, kw_only=True)
class Bubbles:
    """A group of circles of a chart."""

    name: str
    circles: Sequence[tuple[float, float, float, str]]
    """x, y, weight (its area) and tooltip of each circle."""
    tone: int = 1
    is_filled: bool = True


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
class _Circle:
    x: float
    y: float
    radius: float
    kind: str
    """Its class in the style of the page."""
    tooltip: str


def line_chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_range: tuple[float | None, float | None] = (None, None),
    y_log: bool = False,
    y_format: Callable[[float], str] | None = None,
) -> Markup | None:
    """Return a chart of lines as a `<figure>`; None without points. Points that are not finite are left out.

    Args:
        title: heading of the figure.
        series: the lines.
        x_label: label of the horizontal axis.
        y_range: lowest and highest value of the vertical axis; None takes it from the points.
        y_log: whether the vertical axis is logarithmic; values of 0 and below are left out.
        y_format: text of a value; by default a short number.

    """
    text = y_format or format_number
    kept = [(entry, _finite(entry, positive=y_log)) for entry in series]
    kept = [(entry, points) for entry, points in kept if points]
    if not kept:
        return None
    x_axis = make_axis([x for _, points in kept for x, _ in points], (None, None), (_LEFT, WIDTH - _RIGHT))
    y_axis = make_axis([y for _, points in kept for _, y in points], y_range, (HEIGHT - _BOTTOM, _TOP), is_log=y_log)
    lines = []
    for entry, points in kept:
        thin = _thin(points)
        placed = [(x_axis(x), y_axis(y)) for x, y in thin]
        tips = [f"{entry.name}: {text(y)} at {x_label} {format_number(x)}" for x, y in thin]
        dots = [(x, y, tip) for (x, y), tip in zip(placed, tips, strict=True)]
        lines.append(_Line(entry.name, entry.tone, "M" + "L".join(f"{x:g} {y:g}" for x, y in placed), dots))
    last = "; ".join(f"{entry.name} from {text(points[0][1])} to {text(points[-1][1])}" for entry, points in kept)
    return _render(
        title,
        f"{title} over {x_label}: {last}",
        x_label,
        [_Tick(x_axis(value), format_number(value)) for value in x_axis.ticks],
        [_Tick(y_axis(value), text(value)) for value in y_axis.ticks],
        lines=lines,
    )


def column_chart(
    title: str,
    columns: Sequence[Column],
    *,
    x_label: str,
    y_max: float | None = None,
    y_format: Callable[[float], str] | None = None,
    max_labels: int = 8,
) -> Markup | None:
    """Return a chart of columns, such as a histogram, as a `<figure>`; None without columns.

    Args:
        title: heading of the figure.
        columns: from left to right.
        x_label: label of the horizontal axis.
        y_max: highest value of the vertical axis, which begins at 0; None takes it from the columns.
        y_format: text of a value; by default a short number.
        max_labels: number of columns that are labeled, at most.

    """
    if not columns:
        return None
    text = y_format or format_number
    y_axis = make_axis([column.value for column in columns], (0, y_max), (HEIGHT - _BOTTOM, _TOP))
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
    return _render(
        title,
        f"{title} over {x_label}; the highest column is {text(highest.value)} at {highest.label}",
        x_label,
        [_Tick(round(_LEFT + (number + 0.5) * step, 1), column.label) for number, column in labeled],
        [_Tick(y_axis(value), text(value)) for value in y_axis.ticks],
        bars=bars,
    )


def bubble_chart(title: str, groups: Sequence[Bubbles], *, x_label: str, description: str) -> Markup:
    """Return a chart of circles as a `<figure>`; both axes are fractions from 0 to 1, and the diagonal is drawn."""
    x_axis = make_axis([0.0, 1.0], (0, 1), (_LEFT, WIDTH - _RIGHT))
    y_axis = make_axis([0.0, 1.0], (0, 1), (HEIGHT - _BOTTOM, _TOP))
    largest = max((weight for group in groups for _, _, weight, _ in group.circles), default=1.0)
    circles = [
        _Circle(
            x_axis(x), y_axis(y), round(max(2.5, _MAX_RADIUS * math.sqrt(weight / largest)), 1),
            f"{'f' if group.is_filled else 'ring s'}{group.tone}", f"{group.name}: {tooltip}",
        )
        for group in groups
        for x, y, weight, tooltip in group.circles
    ]  # fmt: skip
    return _render(
        title,
        description,
        x_label,
        [_Tick(x_axis(value), f"{value:.0%}") for value in x_axis.ticks],
        [_Tick(y_axis(value), f"{value:.0%}") for value in y_axis.ticks],
        circles=circles,
        groups=groups if len(groups) > 1 else (),
        diagonal=(x_axis(0), y_axis(0), x_axis(1), y_axis(1)),
    )


def _render(
    title: str, description: str, x_label: str, x_ticks: Sequence[_Tick], y_ticks: Sequence[_Tick], **marks: Any
) -> Markup:
    empty = {"lines": (), "bars": (), "circles": (), "groups": (), "diagonal": None}
    return render_markup(
        "chart.html.jinja",
        title=title,
        description=description,
        x_label=x_label,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        frame=(_LEFT, _TOP, WIDTH - _RIGHT, HEIGHT - _BOTTOM),
        size=(WIDTH, HEIGHT),
        **{**empty, **marks},
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
