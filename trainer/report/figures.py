"""`curves.png`: the note's plot, of train loss, train accuracy and test accuracy over the epochs."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

from trainer.report.metrics import Row
from trainer.run.atomic import write_atomically

# The first of these that are installed and hold a character draw it.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


def draw_curves(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the rows of a metrics file: train figures at each point within an epoch, evaluations at its end."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    points = [row for row in rows if row["kind"] == "train"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    losses = [row["train_loss"] for row in points]
    # One axis, as in the note, unless the losses (of many classes, say) would flatten the accuracies.
    shared = max(losses, default=0) <= 2
    loss_axes = axes if shared else axes.twinx()
    loss_axes.set_ylim(0, max([1.0, *losses]) * 1.03)
    at = [row["epoch"] for row in points]
    dots = "o" if len(points) < 3 else ""  # a line through one point is not seen
    lines = loss_axes.plot(
        at, losses, f"-{dots}", markersize=4, color="tab:blue", label="train loss" + " (right)" * (not shared)
    )
    accuracies = [row["train_accuracy"] for row in points]
    lines += axes.plot(at, accuracies, f"--{dots}", markersize=4, color="tab:purple", label="train accuracy")
    evaluated = [row for row in rows if row["kind"] == "start"] + epochs
    ends = [row["epoch"] for row in evaluated]
    for part, style, colour in (("val", ":s", "tab:orange"), ("test", "-.o", "tab:green")):
        key = f"{part}_accuracy"
        if epochs and key in epochs[-1]:
            accuracies = [row[key] for row in evaluated]
            lines += axes.plot(ends, accuracies, style, markersize=4, color=colour, label=f"{part} accuracy")
    axes.set_title(title, fontfamily=fonts(), fontsize=9, wrap=True, parse_math=False)
    axes.set(xlabel="epoch", xlim=(0, 1.02 * max(at, default=1)))
    if not shared:
        axes.set_ylim(0, 1.03)
        loss_axes.set_ylabel("train loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150)


def fonts() -> list[str]:
    """Return the families to write names with, which may be in any script."""
    return [name for name in _FONTS if name in get_font_names()]


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG, whole or not at all."""
    with warnings.catch_warnings():
        # A name in a script that no installed font holds is drawn as boxes: nothing to trouble a run with.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
