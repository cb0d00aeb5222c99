"""The HTML page of `regraft check`: findings, charts, and pictures of the duplicates."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup
from PIL import Image
from rich.filesize import decimal

from regraft.contract import own_version
from trainer.check.findings import CheckResult, DuplicateGroup, Finding
from trainer.check.terminal import describe_severities, relative_path
from trainer.data.decode import UnreadableImage, decode
from trainer.pages.charts import Column, column_chart
from trainer.pages.render import render
from trainer.pages.thumbnails import PictureBudget

_MAX_PICTURE_BYTES, _MAX_ERROR_BYTES = 4_000_000, 800_000
_MAX_GROUPS, _MAX_IMAGES, _MAX_ERRORS, _MAX_CUT, _MAX_PATHS, _MAX_CLASSES = 60, 6, 48, 12, 20, 100
_SPLIT_TONES = {"train": 1, "val": 2, "test": 3}
_KINDS = {"exact": "Equal files", "near": "Near-duplicates"}
_DIMMED = 0.3


@dataclass(frozen=True)
class _Picture:
    uri: str | None
    path: str
    text: str


@dataclass(frozen=True)
class _Group:
    heading: str
    problems: Sequence[str]
    """What is wrong with the group, such as `train and test`."""
    pictures: Sequence[_Picture]
    more: int
    """Number of its other images."""


def render_page(result: CheckResult, *, resize: str | None) -> str:
    """Return the page.

    Args:
        result: what was found.
        resize: the option data.resize, for the pictures that the central crop cuts.

    """
    budget = PictureBudget(_MAX_PICTURE_BYTES)
    shown = result.duplicates[:_MAX_GROUPS]
    cut = next((finding for finding in result.findings if finding.kind == "central-crop"), None)
    return render(
        "check.html.jinja",
        result=result,
        verdict=describe_severities(result),
        findings=[(finding, *_paths(finding, result.root)) for finding in result.findings],
        facts=_describe_images(result.statistics),
        class_bars=_class_bars(result),
        more_classes=max(0, len(result.classes) - _MAX_CLASSES),
        legend=[(_SPLIT_TONES[split], _name_split(split, result)) for split in result.counts],
        charts=[chart for chart in _charts(result.statistics) if chart is not None],
        groups=[_describe_group(group, result.root, budget) for group in shown],
        more_groups=len(result.duplicates) - len(shown),
        label_errors=_label_errors(result),
        more_label_errors=max(0, len(result.label_errors) - _MAX_ERRORS),
        cut=_cut_pictures(cut, result.root, budget) if cut else [],
        cut_message=cut.message if cut else "",
        resize=resize or "squash",
        version=own_version(),
    )


def _paths(finding: Finding, root: str) -> tuple[list[str], int]:
    """Return the first paths of a finding, and the number of the others."""
    paths = [relative_path(path, root) for path in finding.paths[:_MAX_PATHS]]
    return paths, len(finding.paths) - len(paths)


def _name_split(split: str, result: CheckResult) -> str:
    source = result.sources.get(split, "")
    total = sum(result.counts[split].values())
    return f"{split}{f' ({source})' if source and source != f'{split}/' else ''}: {total:,} images"


def _describe_images(statistics: Mapping[str, Any]) -> list[tuple[str, str]]:
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


def _class_bars(result: CheckResult) -> list[tuple[str, list[tuple[float, int, str]], str]]:
    """Return the rows of the bar chart of classes, the largest first."""
    totals = {name: sum(counts.get(name, 0) for counts in result.counts.values()) for name in result.classes}
    largest = max(totals.values(), default=1)
    rows = []
    for name in sorted(totals, key=lambda name: (-totals[name], name))[:_MAX_CLASSES]:
        numbers = {split: counts.get(name, 0) for split, counts in result.counts.items()}
        parts = [
            (number / largest, _SPLIT_TONES[split], f"{split}: {number:,}")
            for split, number in numbers.items()
            if number
        ]
        rows.append((name, parts, " + ".join(f"{number:,}" for number in numbers.values())))
    return rows


def _charts(statistics: Mapping[str, Any]) -> list[Markup | None]:
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


def _describe_group(group: DuplicateGroup, root: str, budget: PictureBudget) -> _Group:
    problems = []
    if len(group.splits) > 1:
        problems.append(f"in {' and '.join(split for split in _SPLIT_TONES if split in group.splits)}")
    if len(group.labels) > 1:
        problems.append("with different classes")
    pictures = [
        _Picture(budget.thumbnail(image.path, 200), relative_path(image.path, root), f"{image.split} · {image.label}")
        for image in group.images[:_MAX_IMAGES]
    ]
    return _Group(_KINDS[group.kind], problems, pictures, len(group.images) - len(pictures))


def _label_errors(result: CheckResult) -> list[_Picture]:
    """Return pictures of the most likely label errors; their text is the label and the suggested class."""
    budget = PictureBudget(_MAX_ERROR_BYTES)
    return [
        _Picture(
            budget.thumbnail(error.image.path, 200),
            relative_path(error.image.path, result.root),
            f"{error.image.label} → {error.suggested}",
        )
        for error in result.label_errors[:_MAX_ERRORS]
    ]


def _cut_pictures(finding: Finding, root: str, budget: PictureBudget) -> list[_Picture]:
    """Return pictures whose parts outside of the central square are dimmed."""
    pictures = []
    for path in finding.paths[:_MAX_CUT]:
        try:
            image = Image.fromarray(decode(path))
        except UnreadableImage:  # changed since it was checked
            continue
        image.thumbnail((320, 320))
        pixels = np.asarray(image)
        height, width, _ = pixels.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        dimmed = (_DIMMED * pixels + (1 - _DIMMED) * 128).astype(np.uint8)
        dimmed[top : top + side, left : left + side] = pixels[top : top + side, left : left + side]
        pictures.append(_Picture(budget.thumbnail(dimmed, 320), relative_path(path, root), f"{width} : {height}"))
    return pictures
