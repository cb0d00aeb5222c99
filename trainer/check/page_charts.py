"""Charts of the page of `regraft check`: classes, sizes and aspect ratios."""

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from markupsafe import Markup
from rich.filesize import decimal

from trainer.check.findings import CheckResult
from trainer.pages.charts import Column, column_chart

MAX_CLASSES = 100
"""Number of classes in the bar chart."""
SPLIT_TONES = {"train": 1, "val": 2, "test": 3}
"""Split -> tone of its bars."""


def describe_images(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return names and values of the statistics of the readable images."""
    if not statistics.get("readable"):
        return []
    formats, modes = (
        ", ".join(f"{name} {number:,}" for name, number in statistics[key].items()) for key in ("formats", "modes")
    )
    width, height, ratio = (statistics[key] for key in ("width", "height", "aspect_ratio"))
    return [
        ("readable", f"{statistics['readable']:,} images, {decimal(statistics['bytes'])}"),
        ("formats", formats),
        ("modes", modes),
        ("width", f"median {width['median']:.0f}, {width['min']:.0f} to {width['max']:.0f} pixels"),
        ("height", f"median {height['median']:.0f}, {height['min']:.0f} to {height['max']:.0f} pixels"),
        ("longer / shorter side", f"median {ratio['median']:.2f}, at most {ratio['max']:.2f}"),
    ]


def class_bars(result: CheckResult) -> list[tuple[str, list[tuple[float, int, str]], str]]:
    """Return the rows of the bar chart of classes, the largest first."""
    totals = {name: sum(counts.get(name, 0) for counts in result.counts.values()) for name in result.classes}
    largest = max(totals.values(), default=1)
    rows = []
    for name in sorted(totals, key=lambda name: (-totals[name], name))[:MAX_CLASSES]:
        numbers = {split: counts.get(name, 0) for split, counts in result.counts.items()}
        parts = [
            (number / largest, SPLIT_TONES[split], f"{split}: {number:,}")
            for split, number in numbers.items()
            if number
        ]
        rows.append((name, parts, " + ".join(f"{number:,}" for number in numbers.values())))
    return rows


def charts(statistics: Mapping[str, Any]) -> list[Markup | None]:
    """Return charts of the shorter sides and the aspect ratios of the readable images."""
    if not statistics.get("readable"):
        return []
    sides, ratios = (statistics[key] for key in ("shorter_side_histogram", "aspect_ratio_histogram"))
    return [
        column_chart("Shorter side", _columns(sides, "{:g}"), x_label="pixels", max_labels=len(sides)),
        column_chart("Longer side / shorter side", _columns(ratios, "{:.1f}"), x_label="ratio", max_labels=len(ratios)),
    ]


def _columns(histogram: Sequence[dict[str, float]], form: str) -> list[Column]:
    """Return a column for each bin, labeled by its lower bound."""
    bounds = [form.format(entry["from"]) for entry in histogram]
    ends = [f"{low} to {high}" for low, high in itertools.pairwise(bounds)] + [f"{bounds[-1]} and more"]
    return [
        Column(bound, entry["count"], f"{end}: {entry['count']:,} images")
        for bound, end, entry in zip(bounds, ends, histogram, strict=True)
    ]
