"""Read what a run folder holds, for its report. Nothing in it is trusted: a part that is damaged is left out and named.

It does not import torch.
"""

import csv
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from regraft import yaml_file
from regraft.contract import (
    BASELINE,
    BLOCKS,
    CONFIG,
    ENVIRONMENT,
    EVALUATION,
    METRICS,
    MODEL,
    PREDICTIONS,
    PRETRAIN,
    AttemptRecord,
    latest_attempt_number,
    read_attempts,
    read_file,
)
from trainer.errors import UserError
from trainer.pages.model_header import ModelHeader, read_model_header
from trainer.pages.split_result import SplitResult, parse_classes_row, parse_split

_CHECK = "check.json"
BLOCK_COLUMNS = ("block", "trains", "parameters", "peak_lr", "weight_decay", "batch_norm")
_MAX_BYTES = 1 << 28
_CLASSES_ROW, _MAX_SPLITS = '{"kind": "classes"', 3
_ERRORS = (*yaml_file.ERRORS, TypeError, LookupError, AttributeError)
"""What reading a damaged file may raise."""
T = TypeVar("T")
Row = Mapping[str, Any]


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


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """What a run folder holds; parts that are missing are empty or None."""

    folder: Path
    options: Mapping[str, Any]
    """Dotted name of each option of config.yaml -> value."""
    config: str
    """Text of config.yaml."""
    attempts: Sequence[AttemptRecord]
    has_phases: bool
    """Whether the attempts are those of several phases: pretraining, fine-tuning, baseline."""
    environment: Mapping[str, Any]
    """Record of the latest start."""
    start: Row | None
    """Row of metrics.jsonl before the first update."""
    steps: Sequence[Row]
    """Rows within the epochs."""
    epochs: Sequence[Row]
    splits: Mapping[str, SplitResult]
    """Results of the model file, from evaluation.json; of the latest epoch if there is none."""
    is_evaluated: bool
    """Whether `splits` are from evaluation.json."""
    evaluation: Mapping[str, Any]
    """Other entries of evaluation.json: `epoch`, `temperature`, `calibrated`."""
    predictions: Sequence[PredictedImage]
    model: ModelHeader | None
    baseline: SplitResult | None
    """Result of the baseline from scratch on the reported split."""
    blocks: Sequence[Mapping[str, str]]
    """What is trained of each block: `block`, `trains`, `parameters`, `peak_lr`, `weight_decay`, `batch_norm`."""
    check: Mapping[str, Any] | None
    """check.json, if the data were checked."""
    problems: Sequence[str]
    """A sentence for each part that could not be read."""

    @property
    def reported(self) -> SplitResult | None:
        """Return the result on the test split; without one, on the last split."""
        return _reported(self.splits)

    @property
    def working_folder(self) -> Path | None:
        """Return the working folder of the latest start, which relative paths are relative to."""
        folder = self.environment.get("working_folder")
        return Path(folder) if isinstance(folder, str) else None

    def option(self, name: str, default: Any = None) -> Any:
        """Return the value of an option; `default` if config.yaml does not have it."""
        return self.options.get(name, default)


def read_run(folder: Path) -> RunRecord:
    """Return the record of a run folder.

    Raises:
        UserError: it holds no run.

    """
    if not any((folder / name).is_file() for name in (CONFIG, METRICS, EVALUATION)):
        raise UserError(f"{folder}: not a run folder; expected one with {CONFIG} and {METRICS}")
    problems: list[str] = []

    def attempt(name: str, read: Callable[[Path], T], default: T) -> T:
        path = folder / name
        if not path.exists():
            return default
        try:
            return read(path)
        except (
            OSError,
            *yaml_file.ERRORS,
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            RecursionError,
        ) as error:
            problems.append(f"{name} cannot be read ({' '.join(str(error).split())[:160] or type(error).__name__})")
            return default

    config = attempt(CONFIG, _read_text, "")
    options: dict[str, Any] = attempt(CONFIG, _read_options, {})
    rows: list[Row] = attempt(METRICS, lambda path: _read_rows(path, problems), [])
    evaluation: dict[str, Any] = attempt(EVALUATION, _read_object, {})
    splits: dict[str, SplitResult] = {}
    if evaluation:
        splits = attempt(EVALUATION, lambda _: _parse_splits(evaluation), {})
    epochs = [row for row in rows if row["kind"] == "epoch"]
    root = folder.parent if folder.name in (PRETRAIN, BASELINE) else folder  # of the attempts of all phases
    latest = f"{latest_attempt_number(root):04}.json"
    return RunRecord(
        folder=folder,
        options=options,
        config=config,
        attempts=read_attempts(root),
        has_phases=any((root / name).is_dir() for name in (PRETRAIN, BASELINE)),
        environment=attempt(os.path.relpath(root / ENVIRONMENT / latest, folder), _read_object, {}),
        start=next((row for row in rows if row["kind"] == "start"), None),
        steps=[row for row in rows if row["kind"] == "train"],
        epochs=epochs,
        splits=splits or attempt(METRICS, lambda _: _latest_splits(epochs, rows), {}),
        is_evaluated=bool(splits),
        evaluation=evaluation,
        predictions=attempt(PREDICTIONS, _read_predictions, []) if splits else [],
        model=attempt(MODEL, read_model_header, None),
        baseline=attempt(f"{BASELINE}/{EVALUATION}", _read_reported, None),
        blocks=attempt(BLOCKS, _read_blocks, []),
        check=attempt(_CHECK, _read_object, None),
        problems=problems,
    )


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


def _read_text(path: Path) -> str:
    return read_file(path, max_bytes=_MAX_BYTES).decode("utf-8", "replace")


def _read_object(path: Path) -> dict[str, Any]:
    value = json.loads(_read_text(path))
    if not isinstance(value, dict):
        raise TypeError("not a JSON object")
    return value


def _read_options(path: Path) -> dict[str, Any]:
    values = yaml_file.load(path)
    if not isinstance(values, dict):
        raise TypeError("not a mapping of sections")
    return dict(yaml_file.flatten(values))


def _read_rows(path: Path, problems: list[str]) -> list[Row]:
    """Return the rows that are complete; a run that is killed may leave half a line."""
    rows: list[Row] = []
    damaged = 0
    lines = [line for line in _read_text(path).split("\n") if line]
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


def _parse_splits(evaluation: Mapping[str, Any]) -> dict[str, SplitResult]:
    return {str(name): parse_split(str(name), fields) for name, fields in evaluation["splits"].items()}


def _read_reported(path: Path) -> SplitResult | None:
    return _reported(_parse_splits(_read_object(path)))


def _reported(splits: Mapping[str, SplitResult]) -> SplitResult | None:
    results = list(splits.values())
    return splits.get("test") or (results[-1] if results else None)


def _latest_splits(epochs: Sequence[Row], rows: Sequence[Row]) -> dict[str, SplitResult]:
    """Return the results of the latest epoch, without a confusion matrix."""
    if not epochs:
        return {}
    latest = epochs[-1]
    of_classes = [row for row in rows if row["kind"] == "classes" and row["epoch"] == latest["epoch"]]
    return {str(row["split"]): parse_classes_row(row, latest) for row in of_classes}


def _read_blocks(path: Path) -> list[dict[str, str]]:
    return [{key: str(row[key]) for key in BLOCK_COLUMNS} for row in json.loads(_read_text(path))]


def _read_predictions(path: Path) -> list[PredictedImage]:
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
