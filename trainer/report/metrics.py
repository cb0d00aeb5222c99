"""Read and write `metrics.jsonl`, one JSON object per line.

Rows of kind `epoch` are whole epochs, rows of kind `train` are steps within an epoch. A row of kind `classes` has the
metrics of each class on one split after an epoch. A row of kind `start`, epoch 0, is the evaluation before the first
update; runs with a randomly initialized head have none.
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from regraft.contract import METRICS
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Evaluations, SelectBy, selection_score
from trainer.metrics import Progress
from trainer.run.atomic import write_text_atomically

Row = dict[str, Any]


class MetricsFile:
    """Metrics file of a run; each row is flushed when it is appended."""

    def __init__(self, path: Path, text: str = "") -> None:
        """Replace the file by `text`, the rows of a checkpoint: a resumed run repeats the rows after it.

        A process that still has the old file open can no longer write into the run.
        """
        self.path = path
        self.rows = parse_rows(text, str(path))
        self._lines = [text]
        write_text_atomically(path, text)
        self._file = path.open("a", encoding="utf-8")

    def append(self, row: Row) -> None:
        """Append one row."""
        # As ASCII: a class may be named after a folder whose name is not valid Unicode.
        line = json.dumps(row, allow_nan=False) + "\n"
        self.rows.append(row)
        self._lines.append(line)
        self._file.write(line)
        self._file.flush()

    @property
    def text(self) -> str:
        """Return the text of the whole file."""
        return "".join(self._lines)

    def close(self) -> None:
        """Close the file; write errors were already raised by `append`."""
        with suppress(OSError):
            self._file.close()


def restore_metrics(path: Path, text: str) -> None:
    """Rewrite the metrics file of a finished run if it differs from `text`, the rows of the last checkpoint.

    Raises:
        UserError: the file cannot be written.

    """
    try:
        if not path.is_file() or path.read_text(encoding="utf-8", errors="replace") != text:
            write_text_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror or error}); free some disk space") from None


def parse_rows(text: str, where: str) -> list[Row]:
    """Return the rows of a metrics file's text; `where` names the file in error messages.

    Raises:
        UserError: a line is not a metrics row.

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
                f"{where}, line {number}: not a metrics row ({error}); restore the file, or start a new run with "
                "--run.resume never"
            ) from None
        rows.append(row)
    return rows


def read_rows(folder: Path) -> list[Row]:
    """Return the rows of a run's metrics.jsonl; raises a UserError for a line that is not a row."""
    path = folder / METRICS
    return parse_rows(path.read_text(encoding="utf-8"), str(path))


def epoch_rows(rows: list[Row]) -> list[Row]:
    """Return the rows of kind `epoch`."""
    return [row for row in rows if row["kind"] == "epoch"]


def row_score(row: Row, split: str, metric: SelectBy) -> tuple[float, float]:
    """Return the key to compare epochs by, from a row of kind `epoch`; see `selection_score`."""
    loss: float = row[f"{split}_loss"]
    return selection_score(metric, loss if metric == "log_loss" else row[f"{split}_{metric}"], loss)


def train_row(progress: Progress, steps_per_epoch: int, memory: int) -> Row:
    """Return the row of a step within an epoch: its metrics are those of the epoch so far."""
    epoch = progress.epoch - 1 + progress.epoch_step / steps_per_epoch
    return {"kind": "train", "epoch": epoch, **_train_columns(progress, memory)}


def epoch_row(progress: Progress, evaluations: Evaluations, *, evaluation_seconds: float, memory: int) -> Row:
    """Return the row of an epoch; `memory` is the peak memory of rank 0 [bytes]."""
    row: Row = {"kind": "epoch", "epoch": progress.epoch, **_train_columns(progress, memory)}
    return row | {"evaluation_seconds": evaluation_seconds} | _evaluation_columns(evaluations)


def _train_columns(progress: Progress, memory: int) -> Row:
    metrics = progress.metrics
    return {
        "step": progress.step,
        "train_loss": metrics.loss,
        "train_accuracy": metrics.accuracy,
        "train_seen": metrics.seen,
        "examples_per_sec": metrics.rate,
        "examples_per_sec_compute": metrics.compute_rate,
        "seconds": metrics.seconds,
        **{f"lr_{name}": lr for name, lr in progress.lr.items()},
        "memory_bytes": memory,
    }


def class_rows(progress: Progress, evaluations: Evaluations, classes: Sequence[str]) -> list[Row]:
    """Return a row of kind `classes` for each split: lists in the order of the classes."""
    position = {"kind": "classes", "epoch": progress.epoch, "step": progress.step}
    return [
        {**position, "split": split, **class_columns(evaluation, classes)} for split, evaluation in evaluations.items()
    ]


def class_columns(evaluation: Evaluation, classes: Sequence[str]) -> Row:
    """Return counts, precision, recall and F1 of each class, as lists in the order of the classes."""
    return {
        "classes": list(classes),
        "support": list(evaluation.support),
        "predicted": list(evaluation.predicted),
        "correct": list(evaluation.correct),
        "precision": list(evaluation.precision),
        "recall": list(evaluation.recall),
        "f1": list(evaluation.f1),
    }


def start_row(evaluations: Evaluations, seconds: float) -> Row:
    """Return the row of the evaluation before the first step; `seconds` is the time to initialize the head."""
    return {"kind": "start", "epoch": 0, "step": 0, "seconds": seconds, **_evaluation_columns(evaluations)}


def _evaluation_columns(evaluations: Evaluations) -> Row:
    row: Row = {}
    for split, evaluation in evaluations.items():
        low, high = evaluation.interval
        row |= {
            f"{split}_accuracy": evaluation.accuracy,
            f"{split}_balanced_accuracy": evaluation.balanced_accuracy,
            f"{split}_f1_macro": evaluation.f1_macro,
            f"{split}_loss": evaluation.loss,
            f"{split}_seen": evaluation.seen,
            f"{split}_correct": sum(evaluation.correct),
            f"{split}_interval": [low, high],
        }
    return row
