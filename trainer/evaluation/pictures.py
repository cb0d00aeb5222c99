"""Pictures of a report: confusion matrix, reliability diagram, and precision and recall of each class."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.evaluation.report import SplitReport
from trainer.report.figures import set_title, try_write_figure
from trainer.text import shorten

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFUSION, RELIABILITY, CLASSES = "confusion.png", "reliability.png", "classes.png"
_MAX_NAMES, _MAX_COUNTS, _MAX_BARS = 40, 25, 30
_MAX_NAME_LENGTH = 24


def write_pictures(folder: Path, report: SplitReport, *, title: str, warn: Callable[[str], object]) -> list[str]:
    """Draw the pictures of a report; return the names of the files. `warn` is told why one was not drawn."""
    bars = min(len(report.classes), _MAX_BARS)
    pictures: dict[str, tuple[Callable[[Figure], None], tuple[float, float]]] = {
        RELIABILITY: (partial(draw_reliability, report, title=title), (5.2, 5.6)),
        CLASSES: (partial(draw_classes, report, title=title), (6.4, 1.9 + 0.32 * bars)),
    }
    if report.confusion is not None:
        write_confusion(folder / CONFUSION, report.confusion, report.classes, title=title, warn=warn)
    for name, (draw, size) in pictures.items():
        try_write_figure(folder / name, draw, size=size, warn=warn)
    return [name for name in (*pictures, CONFUSION) if (folder / name).exists()]


def write_confusion(
    path: Path, confusion: Sequence[Sequence[int]], classes: Sequence[str], *, title: str, warn: Callable[[str], object]
) -> None:
    """Draw a confusion matrix: the count of each label (row) and predicted class (column)."""
    side = max(4.8, 2.5 + 0.28 * len(classes)) if len(classes) <= _MAX_NAMES else 8.0
    try_write_figure(
        path, partial(_draw_confusion, confusion, classes, title=title), size=(side + 0.8, side), warn=warn
    )


def _draw_confusion(
    confusion: Sequence[Sequence[int]], classes: Sequence[str], figure: "Figure", *, title: str
) -> None:
    """Draw a confusion matrix: the color is the fraction of a class, the number is a count of images."""
    axes, count = figure.add_subplot(), len(classes)
    fractions = [[value / max(1, sum(row)) for value in row] for row in confusion]
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the class", shrink=0.8)
    if count <= _MAX_COUNTS:
        for label, row in enumerate(confusion):
            for predicted, value in enumerate(row):
                color = "white" if fractions[label][predicted] > 0.5 else "black"
                axes.text(predicted, label, str(value), ha="center", va="center", color=color, fontsize=8)
    if count <= _MAX_NAMES:
        names = _short(classes)
        axes.set_xticks(range(count), names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(count), names, fontsize=8, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="true class")
    set_title(axes, title)


def draw_reliability(report: SplitReport, figure: "Figure", *, title: str) -> None:
    """Draw accuracy over confidence, and below it how many predictions have that confidence."""
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    bins = [entry for entry in report.reliability if entry.count]
    width = report.reliability[0].high - report.reliability[0].low
    centers = [(entry.low + entry.high) / 2 for entry in bins]
    above.plot([0, 1], [0, 1], "--", color="gray", linewidth=1, label="perfectly calibrated")
    above.bar(centers, [entry.accuracy or 0.0 for entry in bins], 0.94 * width, color="tab:blue", alpha=0.75)
    above.plot(
        [entry.confidence for entry in bins], [entry.accuracy for entry in bins], "o", color="black", markersize=3.5,
        label="mean of the bin",
    )  # fmt: skip
    above.set(ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    above.legend(fontsize=9, frameon=False, loc="upper left")
    above.grid(alpha=0.3)
    below.bar(centers, [entry.count for entry in bins], 0.94 * width, color="tab:gray")
    below.set(xlabel="confidence (probability of the predicted class)", ylabel="images")
    below.grid(alpha=0.3)
    set_title(above, f"{title}\nexpected calibration error {report.ece:.3f}, log loss {report.evaluation.loss:.3f}")


def draw_classes(report: SplitReport, figure: "Figure", *, title: str) -> None:
    """Draw precision and recall of each class with examples, the lowest F1 first; of many classes, the worst ones."""
    axes, evaluation = figure.add_subplot(), report.evaluation
    order = sorted(
        (label for label, support in enumerate(evaluation.support) if support), key=lambda label: evaluation.f1[label]
    )
    shown = order[:_MAX_BARS]
    names = _short([report.classes[label] for label in shown])
    ticks = [f"{name} ({evaluation.support[label]})" for name, label in zip(names, shown, strict=True)]
    for offset, values, name, color in (
        (-0.2, evaluation.precision, "precision", "tab:orange"),
        (0.2, evaluation.recall, "recall", "tab:blue"),
    ):
        places = [place + offset for place in range(len(shown))]
        axes.barh(places, [values[label] for label in shown], 0.38, color=color, label=name)
    axes.set_yticks(range(len(shown)), ticks, fontsize=8, parse_math=False)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.set_xlabel("precision and recall; in brackets: number of images")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(fontsize=8, frameon=False, loc="outside lower center", ncols=2)
    part = f"\nthe {len(shown)} of {len(order)} classes with the lowest F1" if len(shown) < len(order) else ""
    set_title(axes, f"{title}{part}")


def _short(names: Sequence[str]) -> list[str]:
    return [shorten(name, limit=_MAX_NAME_LENGTH) for name in names]
