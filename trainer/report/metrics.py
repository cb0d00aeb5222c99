"""`metrics.jsonl`: one JSON object a line; kind `epoch` for whole epochs, kind `train` for points within one.

Kind `start`, epoch 0, stands before them where the output layer was not drawn: what it is worth before any update.
"""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.loop import Evaluations, Progress
from trainer.run.atomic import write_text_atomically

Row = dict[str, Any]


class MetricsFile:
    """The rows of a run, appended as they come and flushed each time."""

    def __init__(self, path: Path, text: str = "") -> None:
        """Begin with the rows of a checkpoint: what a run wrote after it is made again.

        The file is replaced, not changed: a process that still holds the earlier one writes to nobody.
        """
        self.path = path
        self.rows = parse_rows(text, str(path))
        self._lines = [text]
        write_text_atomically(path, text)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Write one row."""
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        self.rows.append(row)
        self._lines.append(line)
        self._file.write(line)
        self._file.flush()

    @property
    def text(self) -> str:
        """Return the whole file's text."""
        return "".join(self._lines)

    def close(self) -> None:
        """Write no more; what could not be written was told when it was tried."""
        with suppress(OSError):
            self._file.close()


def restore_metrics(path: Path, text: str) -> None:
    """Write the rows of a finished run's last checkpoint, where a kill or somebody has left others.

    Raises:
        UserError: they cannot be written.

    """
    try:
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); make room") from None


def parse_rows(text: str, where: str) -> list[Row]:
    """Return the rows of a metrics file's text.

    Raises:
        UserError: a line that is not one of ours; `where` names the file.

    """
    rows: list[Row] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
            if not (isinstance(row["epoch"], int | float) and isinstance(row["kind"], str)):
                raise TypeError("epoch or kind")
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{where}, line {number}: not a row of metrics ({error}); restore the file, or start anew with "
                "--run.resume never"
            ) from None
        rows.append(row)
    return rows


def epoch_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of whole epochs."""
    return [row for row in rows if row["kind"] == "epoch"]


def train_row(progress: Progress, steps_per_epoch: int) -> Row:
    """Return the row of a point within an epoch: its figures are those of the epoch so far."""
    return {
        "kind": "train",
        "epoch": progress.epoch - 1 + progress.epoch_step / steps_per_epoch,
        "step": progress.step,
        "train_loss": progress.metrics.loss,
        "train_accuracy": progress.metrics.accuracy,
        "train_seen": progress.metrics.seen,
        **{f"lr_{name}": lr for name, lr in progress.lr.items()},
    }


def epoch_row(progress: Progress, evaluations: Evaluations, memory: int) -> Row:
    """Return the row of an epoch; rates are examples a second, memory the peak in bytes of rank 0."""
    figures = progress.metrics
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
    return row | _figures_of(evaluations)


def start_row(evaluations: Evaluations, seconds: float) -> Row:
    """Return the row of the model before the first step; the seconds are those that its output layer took."""
    return {"kind": "start", "epoch": 0, "step": 0, "seconds": seconds, **_figures_of(evaluations)}


def _figures_of(evaluations: Evaluations) -> Row:
    row: Row = {}
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
