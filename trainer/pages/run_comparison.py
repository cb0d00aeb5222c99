"""One page that shows several runs beside each other: results, differing options, curves and classes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from regraft.contract import own_version
from trainer.pages.charts import Series, line_chart
from trainer.pages.render import duration, percent, render
from trainer.pages.run_facts import describe_status
from trainer.pages.run_record import RunRecord, number, points
from trainer.pages.split_result import SplitResult

_NOT_COMPARED = ("run.dir", "run.resume", "run.report")
_MAX_CLASSES, _TONES = 300, 6
_MAX_EXACT = 2000
"""Up to this number of images on which two runs differ, the test is exact."""
_LEVEL = 0.05


@dataclass(frozen=True)
class PairedTest:
    """Two runs on the same images: on which of them one is right and the other is wrong (McNemar 1947)."""

    images: int
    only_first: int
    """Images that only the first run predicts correctly."""
    only_second: int

    @property
    def p_value(self) -> float:
        """Return the probability of a difference of at least this size, if both runs are equally good."""
        total, least = self.only_first + self.only_second, min(self.only_first, self.only_second)
        if total == 0:
            return 1.0
        if total > _MAX_EXACT:
            return math.erfc((abs(self.only_first - self.only_second) - 1) / math.sqrt(2 * total))
        tail: int = sum(math.comb(total, count) for count in range(least + 1))
        return float(min(1.0, 2 * tail / 2**total))


@dataclass(frozen=True)
class _Interval:
    name: str
    accuracy: float
    low: float
    high: float
    tone: int


def render_comparison(runs: Sequence[RunRecord]) -> str:
    """Return the page of two or more runs, the most accurate first."""
    named = sorted(zip(_names(runs), runs, strict=True), key=lambda pair: -_accuracy(pair[1]))
    results = [(name, run, run.reported) for name, run in named]
    rated = [(name, run, result) for name, run, result in results if result is not None]
    tones = {name: index % _TONES + 1 for index, (name, _) in enumerate(named)}
    return render(
        "comparison.html.jinja",
        verdict=_verdict(rated),
        notes=_notes(rated, len(runs)),
        intervals=[
            _Interval(name, result.accuracy, *result.interval, tones[name]) for name, _, result in rated
        ],
        rows=[_row(name, run, result) for name, run, result in results],
        options=_differing_options(named),
        names=[name for name, _ in named],
        charts=_charts(named, tones),
        classes=_class_rows(rated),
        class_names=[name for name, _, _ in rated],
        problems=[f"{name}: {problem}" for name, run in named for problem in run.problems],
        written=datetime.now().astimezone().strftime("%Y-%m-%d %H:%M"),
        version=own_version(),
    )  # fmt: skip


def paired_test(first: RunRecord, second: RunRecord) -> PairedTest | None:
    """Return the comparison of two runs on the images that both have predicted; None if there are none."""
    outcomes = []
    for run in (first, second):
        split = run.reported.split if run.reported is not None else ""
        outcomes.append({entry.path: entry.is_correct for entry in run.predictions if entry.split == split})
    common = outcomes[0].keys() & outcomes[1].keys()
    if not common:
        return None
    pairs = [(outcomes[0][path], outcomes[1][path]) for path in common]
    return PairedTest(len(common), pairs.count((True, False)), pairs.count((False, True)))


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


def _verdict(rated: Sequence[tuple[str, RunRecord, SplitResult]]) -> str:
    """Return a sentence about the two best runs."""
    if len(rated) < 2:
        return "Fewer than two runs have a result yet."
    (first, first_run, first_result), (second, second_run, second_result) = rated[:2]
    difference = first_result.accuracy - second_result.accuracy
    test = paired_test(first_run, second_run)
    if test is None:
        overlap = first_result.interval[0] <= second_result.interval[1]
        return (
            f"{first} is {percent(difference)} more accurate than {second}; their 95 % intervals "
            f"{'overlap' if overlap else 'do not overlap'}."
        )
    counts = (
        f"of {test.images:,} common images, {test.only_first} are right with {first} alone and {test.only_second} with "
        f"{second} alone"
    )
    if test.p_value >= _LEVEL:
        return (
            f"The two best runs, {first} and {second}, do not differ beyond chance: {counts} (McNemar's test, "
            f"p = {test.p_value:.2g})."
        )
    return f"{first} is better than {second}, beyond chance: {counts} (McNemar's test, p = {test.p_value:.2g})."


def _notes(rated: Sequence[tuple[str, RunRecord, SplitResult]], count: int) -> list[str]:
    """Return what limits the comparison."""
    notes = []
    if len({(result.split, result.examples) for _, _, result in rated}) > 1:
        notes.append("The runs were evaluated on different images: their accuracies cannot be compared directly.")
    if not all(run.is_evaluated for _, run, _ in rated) or len(rated) < count:
        notes.append("Some runs are not finished: their result is that of the latest epoch.")
    if count > 2:
        notes.append("The best of many runs is better than its true accuracy: choose on a validation split.")
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


def _differing_options(named: Sequence[tuple[str, RunRecord]]) -> list[tuple[str, list[str]]]:
    """Return the options in which the runs differ, with the value of each run."""
    keys = sorted({key for _, run in named for key in run.options} - {*_NOT_COMPARED})
    rows = [(key, [str(run.option(key, "–")) for _, run in named]) for key in keys]
    return [(key, values) for key, values in rows if len({*values}) > 1]


def _charts(named: Sequence[tuple[str, RunRecord]], tones: dict[str, int]) -> list[Any]:
    charts = []
    for title, key, low in (
        ("Accuracy", "{split}_accuracy", None),
        ("Loss", "{split}_loss", 0.0),
        ("Training loss", "train_loss", 0.0),
    ):
        series = [
            Series(
                name=name,
                points=points([*([run.start] if run.start else []), *run.epochs], key.format(split=_split(run))),
                tone=tones[name],
            )
            for name, run in named
        ]
        form = "{:.0%}".format if low is None else None
        charts.append(line_chart(title, series, x_label="epoch", y_range=(low, None), y_format=form))
    return [chart for chart in charts if chart is not None]


def _split(run: RunRecord) -> str:
    return run.reported.split if run.reported is not None else "test"


def _class_rows(rated: Sequence[tuple[str, RunRecord, SplitResult]]) -> list[list[Any]]:
    """Return the recall of each class in each run, the classes that differ most first; empty for other classes."""
    if len({tuple(entry.name for entry in result.classes) for _, _, result in rated}) != 1:
        return []
    rows: list[tuple[float, list[Any]]] = []
    for entries in zip(*(result.classes for _, _, result in rated), strict=True):
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
