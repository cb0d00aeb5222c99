"""Summary at the end of a run: reported accuracy, output files, and the comparison of two runs."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.box import SIMPLE_HEAD
from rich.table import Table

from regraft.contract import MODEL, REPORT
from trainer.evaluate import SelectBy
from trainer.report.console import format_duration
from trainer.report.metrics import Row, row_score


@dataclass(frozen=True, kw_only=True)
class TrainResult:
    """A finished phase of a run."""

    folder: Path
    """Folder of the phase."""
    examples: tuple[int, int]
    """Number of training and of test examples."""
    val_split: str | None
    """Split that selects the best epoch; None if there is only the reported split."""
    select_by: SelectBy = "accuracy"
    """Metric that selects the best epoch."""
    rows: Sequence[Row] = ()
    """Rows of the epochs in metrics.jsonl; empty on ranks other than 0."""
    alpha: float = 1.0
    """WiSE-FT coefficient of the model file: 1 for the fine-tuned weights, lower if interpolated."""
    seconds: float = 0.0
    """Wall-clock seconds of this process, from loading the data to the last save."""

    @property
    def model_file(self) -> Path:
        """Return the file with the weights of the best epoch, or those that WiSE-FT selected."""
        return self.folder / MODEL


def best_row(rows: Sequence[Row], selection: str | None, select_by: SelectBy = "accuracy") -> Row:
    """Return the epoch with the best metric on `selection`; ties go to the lowest loss, then to the first."""
    return max(rows, key=lambda row: row_score(row, selection or "test", select_by))


def reported_row(rows: Sequence[Row], selection: str | None, select_by: SelectBy = "accuracy") -> Row:
    """Return the epoch whose test accuracy is reported.

    It is the best epoch on the selection split. Without one it is the last epoch: a best epoch that was selected on
    the test images would be biased.
    """
    return best_row(rows, selection, select_by) if selection else rows[-1]


def headline(run: TrainResult) -> str:
    """Return the reported accuracy with its confidence interval and its counts."""
    row = reported_row(run.rows, run.val_split, run.select_by)
    low, high = row["test_interval"]
    which = "the last epoch"
    if run.val_split:
        metric = "" if run.select_by == "accuracy" else f" by {run.select_by}"
        column = "loss" if run.select_by == "log_loss" else run.select_by
        value = row[f"{run.val_split}_{column}"]
        which = f"the best of {len(run.rows)} epochs on {run.val_split}{metric} ({value:.3f})"
    return (
        f"test accuracy {row['test_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}; {row['test_correct']} of "
        f"{row['test_seen']} correct) after epoch {row['epoch']}, {which}"
    )


def summary(run: TrainResult, *, alpha: float = 1.0) -> str:
    """Return the summary of a finished run, a few lines long.

    Args:
        run: the finished run.
        alpha: WiSE-FT coefficient of the model file, 0 for the initial weights and 1 for the best epoch's.

    """
    best = best_row(run.rows, run.val_split, run.select_by)
    last = run.rows[-1]
    train_examples, test_examples = run.examples
    interpolation = "" if alpha == 1 else f", interpolated with the initial weights at alpha {alpha:g} (wise.json)"
    training_seconds = sum(row["seconds"] for row in run.rows)
    lines = [
        headline(run),
        f"examples per epoch: {last['train_seen']} of {train_examples} trained on, {last['test_seen']} of "
        f"{test_examples} evaluated",
    ]
    if run.val_split is None:
        lines.append(
            f"best {best['test_accuracy']:.3f} after epoch {best['epoch']}: selected on the test images, therefore "
            "optimistic; data.val_fraction sets images aside for the selection"
        )
    lines += [
        f"time {format_duration(run.seconds)}, training {format_duration(training_seconds)}",
        f"run folder {run.folder}",
        f"  model.safetensors  weights of the best epoch ({best['epoch']}){interpolation}; regraft.load reads it",
        "  checkpoints/       training state, to resume or extend the run",
        "  evaluation.json    metrics on each split; predictions.csv has each image",
        "  metrics.jsonl      metrics of training",
        "  curves.png         plot of the metrics",
        "  config.yaml        all options; reproduces this run",
    ]
    if (run.folder / REPORT).exists():
        lines.append("  report.html        result, confused classes, what to do next, curves")
    return "\n".join(lines)


def comparison(fine_tuned: TrainResult, scratch: TrainResult) -> Table:
    """Return a table of the fine-tuned run and of the run from scratch."""
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("test accuracy", "95 % interval", "train loss", "epochs", "training"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, run in (("fine-tuned", fine_tuned), ("from scratch", scratch)):
        row = reported_row(run.rows, run.val_split, run.select_by)
        low, high = row["test_interval"]
        table.add_row(
            name,
            f"{row['test_accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['train_loss']:.3f}",
            str(len(run.rows)),
            format_duration(sum(epoch["seconds"] for epoch in run.rows)),
        )
    return table
