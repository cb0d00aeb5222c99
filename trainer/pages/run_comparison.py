"""One page that shows several runs beside each other: results, differing options, curves and classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from markupsafe import Markup

from regraft.contract import own_version
from trainer.pages.charts import Series, line_chart
from trainer.pages.paired_test import paired_test
from trainer.pages.render import duration, percent, render
from trainer.pages.run_facts import describe_status
from trainer.pages.run_files import number, points
from trainer.pages.run_record import RunRecord
from trainer.pages.split_result import SplitResult
from trainer.text import join_truncated

_NOT_COMPARED = ("run.dir", "run.resume", "run.report")
_MAX_CLASSES, _TONES = 300, 6
_LEVEL = 0.05


@dataclass(frozen=True)
class _Interval:
    name: str
    accuracy: float
    low: float
    high: float
    tone: int


_Known = tuple[str, RunRecord, SplitResult]
"""Name, run, and its result."""


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """Return the page of two or more runs, the most accurate first."""
    named = sorted(zip(_names(runs), runs, strict=True), key=lambda pair: -_accuracy(pair[1]))
    known = [(name, run, run.reported) for name, run in named if run.reported is not None]
    comparable = _comparable(known)
    first = {name for name, _, _ in comparable}
    named.sort(key=lambda pair: pair[0] not in first)
    tones = {name: min(position, _TONES) for position, (name, _) in enumerate(named, start=1)}
    return render(
        "comparison.html.jinja",
        verdict=_verdict(comparable, len(runs)),
        notes=_notes(known, comparable, len(runs)),
        intervals=[
            _Interval(name, run.reported.accuracy, *run.reported.interval, tones[name])
            for name, run in named
            if run.reported is not None
        ],
        rows=[_row(name, run, run.reported) for name, run in named],
        options=_differing_options(named),
        names=[name for name, _ in named],
        charts=_charts(named, tones),
        num_drawn=min(len(named), _TONES - 1),
        classes=_class_rows(comparable),
        class_names=[name for name, _, _ in comparable],
        is_sorted=len(comparable) == len(known),
        problems=[f"{name}: {problem}" for name, run in named for problem in run.problems],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=own_version(),
    )


def _names(runs: Sequence[RunRecord]) -> list[str]:
    """Return a name for each run: its folder's, with parents as far as two runs would have the same name."""
    paths = [run.folder.resolve() for run in runs]
    for depth in range(1, 6):
        names = ["/".join(path.parts[-depth:]) for path in paths]
        if len({*names}) == len(names):
            return names
    return [f"{path} ({position})" for position, path in enumerate(paths, start=1)]


def _accuracy(run: RunRecord) -> float:
    return -1.0 if run.reported is None else run.reported.accuracy


def _comparable(known: Sequence[_Known]) -> list[_Known]:
    """Return the most runs whose results are of the same number of images of the same classes and split."""
    groups: dict[Any, list[_Known]] = {}
    for entry in known:
        result = entry[2]
        key = (result.split, result.examples, tuple(of_class.name for of_class in result.classes))
        groups.setdefault(key, []).append(entry)
    return max(groups.values(), key=len, default=[])


def _verdict(comparable: Sequence[_Known], count: int) -> str:
    """Return a sentence about the two best runs that can be compared."""
    if not comparable:
        return "No run has a result yet."
    if len(comparable) < 2:
        return "No two runs have results on the same test images, so that they cannot be compared."
    (first, first_run, first_result), (second, second_run, second_result) = comparable[:2]
    difference = first_result.accuracy - second_result.accuracy
    test = paired_test(first_run, second_run)
    best = "the two best runs, " if count > 2 else ""
    if test is None:
        overlap = first_result.interval[0] <= second_result.interval[1]
        return (
            f"{first} is {percent(difference)} more accurate than {second}; their 95 % intervals "
            f"{'overlap' if overlap else 'do not overlap'}."
        )
    counts = (
        f"of {test.images:,} images that both have predicted, {test.only_first:,} are right with {first} alone and "
        f"{test.only_second:,} with {second} alone (McNemar's test, p = {test.p_value:.2g})"
    )
    if test.p_value >= _LEVEL:
        start = f"{best}{first} and {second}, do" if best else f"{first} and {second} do"
        return f"{start[0].upper() if best else start[0]}{start[1:]} not differ beyond chance: {counts}."
    return f"{first} is better than {second}, beyond chance: {counts}."


def _notes(known: Sequence[_Known], comparable: Sequence[_Known], count: int) -> list[str]:
    """Return what limits the comparison."""
    notes = []
    if 1 < len(comparable) < len(known):
        others = [name for name, _, _ in known if name not in {name for name, _, _ in comparable}]
        notes.append(
            f"Other test images, so that the accuracies cannot be compared: {join_truncated(others, limit=6)}."
        )
    unfinished = [name for name, run, _ in known if not run.is_evaluated]
    if unfinished:
        notes.append(f"Without the final evaluation, so that the latest epoch counts: {join_truncated(unfinished)}.")
    if len(known) < count:
        notes.append(f"{count - len(known)} of {count} runs have no result.")
    if len(comparable) > 2:
        notes.append("The best of many runs is better by chance, too: choose it on a validation split.")
    return notes


def _row(name: str, run: RunRecord, result: SplitResult | None) -> list[Any]:
    """Return a row of the table of results."""

    def cell(value: float | None, text: str) -> tuple[str, float]:
        return ("–", -1.0) if value is None else (format(value, text).replace("%", " %"), value)

    metrics = result.metrics if result is not None else {}
    seconds = sum(number(row, "seconds") or 0.0 for row in run.epochs)
    seen = sum(number(row, "train_seen") or 0.0 for row in run.epochs)
    interval = f"{percent(result.interval[0])} to {percent(result.interval[1])}" if result is not None else "–"
    return [
        name,
        cell(None if result is None else result.accuracy, ".1%"),
        interval,
        cell(metrics.get("balanced_accuracy"), ".1%"),
        cell(metrics.get("f1_macro"), ".3f"),
        cell(metrics.get("log_loss"), ".3f"),
        cell(metrics.get("ece"), ".3f"),
        (str(len(run.epochs)), len(run.epochs)),
        (duration(seconds), seconds),
        cell(seen / seconds if seconds else None, ",.0f"),
        describe_status(run),
    ]


def _differing_options(named: Sequence[tuple[str, RunRecord]]) -> list[list[str]]:
    """Return the rows of a table of the options in which the runs differ, the headings first; empty if there are none.

    Its longer side goes down: the runs, or the options.
    """
    keys = sorted({key for _, run in named for key in run.options} - {*_NOT_COMPARED})
    columns = [[key, *(str(run.option(key, "–")) for _, run in named)] for key in keys]
    table = [["", *(name for name, _ in named)], *(column for column in columns if len({*column[1:]}) > 1)]
    if len(table) == 1:
        return []
    return table if len(table) > len(table[0]) else [list(row) for row in zip(*table, strict=True)]


def _charts(named: Sequence[tuple[str, RunRecord]], tones: dict[str, int]) -> list[Markup]:
    """Return the curves of the most accurate runs."""
    shown = named[: _TONES - 1]

    def chart(title: str, key: str, low: float | None) -> Markup | None:
        series = [
            Series(
                name=name,
                points=points([*([run.start] if run.start else []), *run.epochs], key.format(split=_split(run))),
                tone=tones[name],
            )
            for name, run in shown
        ]
        text = "{:.0%}".format if low is None else None
        return line_chart(title, series, x_label="epoch", y_range=(low, None), y_format=text)

    charts = (
        chart("Accuracy", "{split}_accuracy", None),
        chart("Loss", "{split}_loss", 0.0),
        chart("Training loss", "train_loss", 0.0),
    )
    return [drawn for drawn in charts if drawn is not None]


def _split(run: RunRecord) -> str:
    return run.reported.split if run.reported is not None else "test"


def _class_rows(comparable: Sequence[_Known]) -> list[list[Any]]:
    """Return the recall of each class in each run, the classes that differ most first; empty for a single run."""
    if len(comparable) < 2:
        return []
    rows: list[tuple[float, list[Any]]] = []
    for entries in zip(*(result.classes for _, _, result in comparable), strict=True):
        recalls = [entry.recall for entry in entries]
        spread = max(recalls) - min(recalls)
        cells = [(percent(value), value) for value in recalls]
        rows.append(
            (
                spread,
                [entries[0].name, (str(entries[0].support), entries[0].support), *cells, (percent(spread), spread)],
            )
        )
    rows.sort(key=lambda row: -row[0])
    return [cells for _, cells in rows[:_MAX_CLASSES]]
