"""Draw `curves.png`: train loss, train accuracy and evaluation accuracy over epochs, as in the D2L recipe."""

import warnings
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.font_manager import get_font_names
from matplotlib.ticker import MaxNLocator

from trainer.report.metrics import Row
from trainer.run.atomic import write_atomically

# Matplotlib draws each character with the first installed font that has it.
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "WenQuanYi Zen Hei", "PingFang SC", "SimHei")


def draw_curves(rows: Sequence[Row], path: Path, *, title: str) -> None:
    """Draw the rows of a metrics file: `train` rows within each epoch, evaluations at the end of each epoch."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    train_rows = [row for row in rows if row["kind"] == "train"]
    epochs = [row for row in rows if row["kind"] == "epoch"]
    losses = [row["train_loss"] for row in train_rows]
    # Losses above 2, as with many classes, get an axis of their own: on a shared one they would flatten the accuracies.
    shares_axis = max(losses, default=0) <= 2
    loss_axes = axes if shares_axis else axes.twinx()
    loss_axes.set_ylim(0, max([1.0, *losses]) * 1.03)
    x = [row["epoch"] for row in train_rows]
    marker = "o" if len(train_rows) < 3 else ""  # a line through one point is invisible
    label = "train loss" if shares_axis else "train loss (right)"
    lines = loss_axes.plot(x, losses, f"-{marker}", markersize=4, color="tab:blue", label=label)
    accuracies = [row["train_accuracy"] for row in train_rows]
    lines += axes.plot(x, accuracies, f"--{marker}", markersize=4, color="tab:purple", label="train accuracy")
    evaluations = [row for row in rows if row["kind"] == "start"] + epochs
    x_evaluations = [row["epoch"] for row in evaluations]
    for split, style, color in (("val", ":s", "tab:orange"), ("test", "-.o", "tab:green")):
        key = f"{split}_accuracy"
        if epochs and key in epochs[-1]:
            accuracies = [row[key] for row in evaluations]
            label = f"{split} accuracy"
            lines += axes.plot(x_evaluations, accuracies, style, markersize=4, color=color, label=label)
    axes.set_title(title, fontfamily=fonts(), fontsize=9, wrap=True, parse_math=False)
    axes.set(xlabel="epoch", xlim=(0, 1.02 * max(x, default=1)))
    if not shares_axis:
        axes.set_ylim(0, 1.03)
        loss_axes.set_ylabel("train loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    figure.legend(handles=lines, loc="outside lower center", ncols=len(lines), frameon=False, fontsize=9)
    save_figure(figure, path, dpi=150)


def fonts() -> list[str]:
    """Return the installed font families for text in any script, in order of preference."""
    return [name for name in _FONTS if name in get_font_names()]


def save_figure(figure: Figure, path: Path, *, dpi: int) -> None:
    """Write a figure as PNG, atomically."""
    with warnings.catch_warnings():
        # Characters that no installed font has are drawn as boxes. This is not worth a warning.
        warnings.filterwarnings("ignore", message=r"Glyph \d+ .* missing from font")
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=dpi))
