"""`curves.png`: the note's plot, of train loss, train accuracy and test accuracy over the epochs."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from trainer.files import write_atomically
from trainer.report.metrics import Row


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
    lines = loss_axes.plot(at, losses, color="tab:blue", label="train loss" + ("" if shared else " (right)"))
    lines += axes.plot(
        at, [row["train_accuracy"] for row in points], "--", color="tab:purple", label="train accuracy"
    )
    ends = [row["epoch"] for row in epochs]
    for part, style, colour in (("val", ":s", "tab:orange"), ("test", "-.o", "tab:green")):
        key = f"{part}_accuracy"
        if epochs and key in epochs[-1]:
            accuracies = [row[key] for row in epochs]
            lines += axes.plot(ends, accuracies, style, markersize=4, color=colour, label=f"{part} accuracy")
    axes.set(xlabel="epoch", title=title, xlim=(0, max(at, default=1)))
    if not shared:
        axes.set_ylim(0, 1.03)
        loss_axes.set_ylabel("train loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(handles=lines, loc="best")
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=150))
