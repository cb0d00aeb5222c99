"""Print the result of `regraft check` as tables of at most 80 columns."""

import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from trainer.check.findings import SEVERITIES, CheckResult, DuplicateGroup, Severity
from trainer.text import escape_unprintable

_WIDTH = 80
_MAX_CLASSES, _MAX_GROUPS, _MAX_IMAGES, _MAX_ERRORS = 12, 5, 4, 5
_STYLES: Mapping[Severity, str] = {"error": "bold red", "warning": "yellow", "note": "dim"}


def print_result(console: Console, result: CheckResult) -> None:
    """Print counts, statistics, duplicates and findings."""
    classes = len(result.classes)
    unit = "class" if classes == 1 else "classes"
    console.print(
        Text(f"{escape_unprintable(result.root)}: {result.num_images:,} images of {classes:,} {unit}"), style="bold"
    )
    for part in (
        _counts(result),
        _statistics(result.statistics),
        _duplicates(result),
        _label_errors(result),
        _findings(result),
    ):
        if part.row_count:
            console.print()
            console.print(part, width=min(console.width, _WIDTH))
    console.print()
    console.print(Text(describe_severities(result)), style="bold")


def describe_severities(result: CheckResult) -> str:
    """Return how many findings of each severity there are, such as `1 error, no warnings, 2 notes`."""
    numbers = {name: sum(finding.severity == name for finding in result.findings) for name in SEVERITIES}
    return ", ".join(f"{number or 'no'} {name}{'' if number == 1 else 's'}" for name, number in numbers.items())


def _counts(result: CheckResult) -> Table:
    """Return the number of images of each class and split, the largest classes first."""
    table = _table()
    table.add_column("class", overflow="fold")
    for split in result.counts:
        source = result.sources.get(split, "")
        table.add_column(f"{split}\n({source})" if source and source != f"{split}/" else split, justify="right")
    totals = {name: sum(counts.get(name, 0) for counts in result.counts.values()) for name in result.classes}
    names = sorted(totals, key=lambda name: (-totals[name], name))
    shown = names if len(names) <= _MAX_CLASSES else [*names[: _MAX_CLASSES // 2], "", *names[-_MAX_CLASSES // 2 :]]
    for name in shown:
        cells = (f"{counts.get(name, 0):,}" if name else "" for counts in result.counts.values())
        table.add_row(Text(escape_unprintable(name) or f"... {len(names) - _MAX_CLASSES:,} more"), *cells)
    if names:
        table.add_row("all", *(f"{sum(counts.values()):,}" for counts in result.counts.values()), style="bold")
    return table


def _statistics(statistics: Mapping[str, Any]) -> Table:
    table = _table(show_header=False)
    if not statistics.get("readable"):
        return table
    width, height, ratio = (statistics[key] for key in ("width", "height", "aspect_ratio"))
    table.add_row("formats", f"{_numbers(statistics['formats'])} ({decimal(statistics['bytes'])})")
    table.add_row("modes", _numbers(statistics["modes"]))
    for name, values in (("width", width), ("height", height)):
        table.add_row(name, f"median {values['median']:.0f} pixels, from {values['min']:.0f} to {values['max']:.0f}")
    table.add_row("sides", f"longer/shorter: median {ratio['median']:.2f}, at most {ratio['max']:.2f}")
    return table


def _numbers(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts.items())


def _duplicates(result: CheckResult) -> Table:
    """Return the first groups of duplicates, with paths relative to the folder of the dataset."""
    groups = result.duplicates
    number = sum(len(group.images) for group in groups)
    table = _table(title=f"{len(groups):,} groups of duplicates ({number:,} images)" if groups else None)
    for name in ("kind", "split", "class", "image"):
        table.add_column(name, overflow="fold")
    for group in groups[:_MAX_GROUPS]:
        for position, row in enumerate(_rows(group, result.root)):
            table.add_row(group.kind if position == 0 else "", *row)
    if len(groups) > _MAX_GROUPS:
        table.add_row("", "", "", f"... {len(groups) - _MAX_GROUPS:,} more groups (see --html or --json)")
    return table


def _label_errors(result: CheckResult) -> Table:
    errors = result.label_errors
    table = _table(title=f"{len(errors):,} likely label errors" if errors else None)
    for name in ("label", "rather", "split", "image"):
        table.add_column(name, overflow="fold")
    for image, suggested, _ in errors[:_MAX_ERRORS]:
        names = (image.label, suggested, image.split, relative_path(image.path, result.root))
        table.add_row(*(Text(escape_unprintable(name)) for name in names))
    if len(errors) > _MAX_ERRORS:
        table.add_row("", "", "", f"... {len(errors) - _MAX_ERRORS:,} more (see --html or --json)")
    return table


def _rows(group: DuplicateGroup, root: str) -> Iterable[tuple[str, str, Text]]:
    for image in group.images[:_MAX_IMAGES]:
        yield image.split, escape_unprintable(image.label), Text(escape_unprintable(relative_path(image.path, root)))
    if len(group.images) > _MAX_IMAGES:
        yield "", "", Text(f"... {len(group.images) - _MAX_IMAGES:,} more")


def relative_path(path: str, root: str) -> str:
    """Return the path of an image relative to the dataset folder or the folder of the CSV, if it is inside."""
    folder = os.path.join(root if Path(root).is_dir() else Path(root).parent, "")  # noqa: PTH118 (trailing slash)
    return path.removeprefix(folder)


def _findings(result: CheckResult) -> Table:
    table = _table(show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for finding in result.findings:
        text = Text.assemble((f"{finding.kind}: ", "bold"), finding.message)
        if finding.remedy:
            text.append(f"\n{finding.remedy}", style="bold")
        for option in finding.options:
            text.append(f"\n  {escape_unprintable(option)}")
        table.add_row(Text(finding.severity, style=_STYLES[finding.severity]), text)
    return table


def _table(*, title: str | None = None, show_header: bool = True) -> Table:
    return Table(
        title=title, title_justify="left", title_style="bold", box=None, pad_edge=False, show_header=show_header
    )
