"""`metrics.jsonl`: one JSON object a line; kind `epoch` for whole epochs, kind `train` for points within one."""

import json
from pathlib import Path
from typing import Any

from trainer.data.names import listed
from trainer.errors import UserError
from trainer.files import write_text_atomically
from trainer.loop import Evaluations, Progress

Row = dict[str, Any]


class MetricsFile:
    """The rows of a run, appended as they come and flushed each time."""

    def __init__(self, path: Path, *, keep_epochs: int) -> None:
        """Keep the rows of the first `keep_epochs` epochs, if there are any, and drop the rest."""
        self.path = path
        rows = [row for row in read_rows(path) if row["epoch"] <= keep_epochs] if keep_epochs else []
        write_text_atomically(path, "".join(_line(row) for row in rows))

    def append(self, row: Row) -> None:
        """Write one row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(row))


def _line(row: Row) -> str:
    return json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"


def read_rows(path: Path) -> list[Row]:
    """Return all rows; a last line that was cut off by a kill is passed over.

    Raises:
        UserError: a line that is not one of ours.

    """
    if not path.is_file():
        return []
    rows: list[Row] = []
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row["epoch"], int | float) and isinstance(row["kind"], str)):
                raise TypeError("epoch or kind")
        except (ValueError, KeyError, TypeError) as error:
            if number == len(lines):
                break
            raise UserError(
                f"{path}, line {number}: not a row of metrics ({error}); restore the file, or start anew with "
                "--run.resume never"
            ) from None
        rows.append(row)
    return rows


def epoch_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of whole epochs."""
    return [row for row in rows if row["kind"] == "epoch"]


def check_epochs(path: Path, epochs: int) -> None:
    """Check that the rows belong to a training state after `epochs` epochs, which a resumed run is to go on from.

    All of them are there; and at most the next one too, whose state was not written any more.

    Raises:
        UserError: rows are missing, or the state is.

    """
    there = {row["epoch"] for row in epoch_rows(read_rows(path))}
    missing = [str(epoch) for epoch in range(1, epochs + 1) if epoch not in there]
    if missing:
        fault = f"lacks epoch {listed(missing)}, but the training state is that after epoch {epochs}"
    elif max(there, default=0) > epochs + 1:
        state = f"the training state is that after epoch {epochs}" if epochs else "there is no training state"
        fault = f"goes on to epoch {max(there)}, but {state}"
    else:
        return
    raise UserError(
        f"{path}: {fault}: one of the two files was lost or replaced. Restore it, or start anew with "
        "--run.resume never, which moves the run aside"
    )


def train_row(progress: Progress, steps_per_epoch: int) -> Row:
    """Return the row of a point within an epoch: its figures are those of the epoch so far."""
    return {
        "kind": "train",
        "epoch": progress.epoch - 1 + progress.epoch_step / steps_per_epoch,
        "step": progress.step,
        "train_loss": progress.figures.loss,
        "train_accuracy": progress.figures.accuracy,
        "train_seen": progress.figures.seen,
        **{f"lr_{name}": lr for name, lr in progress.lr.items()},
    }


def epoch_row(progress: Progress, evaluations: Evaluations, memory: int) -> Row:
    """Return the row of an epoch; rates are examples a second, memory the peak in bytes of rank 0."""
    figures = progress.figures
    row: Row = {
        "kind": "epoch",
        "epoch": progress.epoch,
        "step": progress.step,
        "train_loss": figures.loss,
        "train_accuracy": figures.accuracy,
        "train_seen": figures.seen,
        "examples_per_sec": figures.rate,
        "examples_per_sec_compute": figures.compute_rate,
        "seconds": figures.seconds,
        **{f"lr_{name}": lr for name, lr in progress.lr.items()},
        "memory_bytes": memory,
    }
    for part, found in evaluations.items():
        low, high = found.interval
        row |= {
            f"{part}_accuracy": found.accuracy,
            f"{part}_loss": found.loss,
            f"{part}_seen": found.seen,
            f"{part}_correct": sum(found.correct),
            f"{part}_interval": [low, high],
        }
    return row
