"""What stands at the end of a run: the reported accuracy, where everything lies, and two runs side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.report.console import duration
from trainer.report.metrics import Row


class Finished(Protocol):
    """What a summary needs of a finished run."""

    @property
    def folder(self) -> Path:
        """Return the run folder."""

    @property
    def rows(self) -> Sequence[Row]:
        """Return its epochs."""

    @property
    def selection(self) -> str | None:
        """Return the part that the best epoch was selected on, where it is not the one reported."""

    @property
    def examples(self) -> tuple[int, int]:
        """Return how many there are to train on, and to report on."""

    @property
    def seconds(self) -> float:
        """Return the time of this start."""


def best_row(rows: Sequence[Row], selection: str | None) -> Row:
    """Return the epoch of the highest accuracy on `selection`; of equals that of the lowest loss, then the first."""
    part = selection or "test"
    return max(rows, key=lambda row: (row[f"{part}_accuracy"], -row[f"{part}_loss"]))


def reported_row(rows: Sequence[Row], selection: str | None) -> Row:
    """Return the epoch whose test accuracy is reported.

    With a part to select on, the best on it. With one evaluation folder the last epoch: the best one was
    chosen by looking at that very folder.
    """
    return best_row(rows, selection) if selection else rows[-1]


def headline(run: Finished) -> str:
    """Return the reported accuracy with its interval and its counts."""
    row = reported_row(run.rows, run.selection)
    low, high = row["test_interval"]
    which = (
        f"the best of {len(run.rows)} on {run.selection} ({row[f'{run.selection}_accuracy']:.3f})"
        if run.selection
        else "the last"
    )
    return (
        f"test accuracy {row['test_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}; {row['test_correct']} of "
        f"{row['test_seen']} right) after epoch {row['epoch']}, {which}"
    )


def summary(run: Finished, *, alpha: float = 1.0) -> str:
    """Return the end of a run in a few lines.

    `alpha` is how far from the start to the best epoch the model file's weights are (WiSE-FT).
    """
    best = best_row(run.rows, run.selection)
    last = run.rows[-1]
    to_train, to_test = run.examples
    way = "" if alpha == 1 else f", {alpha:g} of the way to it from the start (wise.json)"
    lines = [
        headline(run),
        f"{last['test_seen']} of {to_test} evaluated, {last['train_seen']} of {to_train} trained on in every epoch",
    ]
    if run.selection is None:
        lines.append(
            f"best {best['test_accuracy']:.3f} after epoch {best['epoch']}: selected on the same images, so too "
            "hopeful; data.val_fraction sets some aside to select on"
        )
    lines += [
        f"time {duration(run.seconds)}, of it {duration(sum(row['seconds'] for row in run.rows))} training",
        f"run folder {run.folder}",
        f"  model.safetensors  the best epoch ({best['epoch']}){way}; trainer.load reads it",
        "  checkpoints/       the training state, to go on from",
        "  metrics.jsonl      every figure",
        "  curves.png         their plot",
        "  config.yaml        every option; runs this again",
    ]
    return "\n".join(lines)


def comparison(fine_tuned: Finished, scratch: Finished) -> Table:
    """Return the two runs beside each other."""
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("test accuracy", "95 % interval", "train loss", "epochs", "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in (("fine-tuned", fine_tuned), ("from scratch", scratch)):
        row = reported_row(run.rows, run.selection)
        low, high = row["test_interval"]
        table.add_row(
            name,
            f"{row['test_accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['train_loss']:.3f}",
            str(len(run.rows)),
            duration(sum(epoch["seconds"] for epoch in run.rows)),
        )
    return table
