"""Read the files of a run folder. Nothing in them is trusted: each function checks what it returns.

It does not import torch.
"""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regraft import yaml_file
from regraft.contract import METRICS, read_file

BLOCK_COLUMNS = ("block", "trains", "parameters", "peak_lr", "weight_decay", "batch_norm")
_MAX_BYTES = 1 << 28
_CLASSES_ROW, _MAX_SPLITS = '{"kind": "classes"', 3
Row = Mapping[str, Any]
ERRORS = (*yaml_file.ERRORS, TypeError, LookupError, AttributeError)
"""What the functions raise for a damaged file."""


@dataclass(frozen=True)
class PredictedImage:
    """One row of predictions.csv."""

    path: str
    split: str
    label: str
    prediction: str
    probability: float
    """Of the prediction."""
    label_probability: float

    @property
    def is_correct(self) -> bool:
        """Return whether the prediction is the label."""
        return self.prediction == self.label


def number(row: Mapping[str, Any], key: str) -> float | None:
    """Return a column of a row if it is a finite number, else None."""
    value = row.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


def points(rows: Sequence[Row], key: str) -> list[tuple[float, float]]:
    """Return (epoch, value) of the rows that have a column."""
    pairs = ((number(row, "epoch"), number(row, key)) for row in rows)
    return [(epoch, value) for epoch, value in pairs if epoch is not None and value is not None]


def read_text(path: Path) -> str:
    """Return the text of a file; bytes that are not UTF-8 are replaced."""
    return read_file(path, max_bytes=_MAX_BYTES).decode("utf-8", "replace")


def read_object(path: Path) -> dict[str, Any]:
    """Return a JSON object."""
    value = json.loads(read_text(path))
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def read_options(path: Path) -> dict[str, Any]:
    """Return the options of config.yaml by their dotted names."""
    values = yaml_file.load(path)
    if not isinstance(values, dict):
        raise TypeError("not a mapping of sections")
    return dict(yaml_file.flatten(values))


def read_rows(path: Path, problems: list[str]) -> list[Row]:
    """Return the rows that are complete; a run that is killed may leave half a line."""
    rows: list[Row] = []
    damaged = 0
    lines = [line for line in read_text(path).split("\n") if line]
    # Rows of kind `classes` are long; those of earlier epochs are not shown.
    of_classes = [position for position, line in enumerate(lines) if line.startswith(_CLASSES_ROW)]
    skipped = {*of_classes[:-_MAX_SPLITS]}
    for line in (line for position, line in enumerate(lines) if position not in skipped):
        try:
            row = json.loads(line)
            if not (isinstance(row, dict) and isinstance(row.get("kind"), str) and number(row, "epoch") is not None):
                raise TypeError("not a row")
            rows.append(row)
        except (ValueError, TypeError, RecursionError):
            damaged += 1
    if damaged:
        problems.append(f"{METRICS}: {damaged} of {len(rows) + damaged} lines are damaged and left out")
    return rows


def read_blocks(path: Path) -> list[dict[str, str]]:
    """Return the rows of blocks.json."""
    return [{key: str(row[key]) for key in BLOCK_COLUMNS} for row in json.loads(read_text(path))]


def read_predictions(path: Path) -> list[PredictedImage]:
    """Return the rows of predictions.csv."""
    if path.stat().st_size > _MAX_BYTES:
        raise ValueError(f"more than {_MAX_BYTES >> 20} MB")
    # Names may hold bytes that are not UTF-8.
    text = read_file(path, max_bytes=_MAX_BYTES).decode("utf-8", "surrogateescape")
    try:
        return [
            PredictedImage(
                row["path"], row["split"], row["label"], row["prediction"],
                _probability(row["probability"]), _probability(row["label_probability"]),
            )
            for row in csv.DictReader(io.StringIO(text, newline=""), strict=True)
        ]  # fmt: skip
    except csv.Error as error:
        raise ValueError(str(error)) from None


def _probability(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise ValueError(f"{text} is no probability")
    return value
