"""Read what a run folder holds, for its report. Nothing in it is trusted: a part that is damaged is left out and named.

It does not import torch.
"""

import os
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
)
from trainer.errors import UserError
from trainer.pages.model_header import ModelHeader, read_model_header
from trainer.pages.run_files import (
    ERRORS,
    PredictedImage,
    Row,
    read_blocks,
    read_object,
    read_options,
    read_predictions,
    read_rows,
    read_text,
)
from trainer.pages.split_result import SplitResult, parse_classes_row, parse_split
from trainer.text import join_truncated

_CHECK = "check.json"
T = TypeVar("T")


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
    def root(self) -> Path:
        """Return the run folder; `folder` may be that of a phase below it."""
        return _root(self.folder)

    @property
    def words(self) -> tuple[str, str]:
        """Return the dataset and the run folder as words of a command line, as seen from the working folder."""
        return self._word(str(self.option("data.root") or "DATA")), self._word(str(self.folder))

    def _word(self, path: str) -> str:
        folder = str(self.working_folder or "")
        inside = folder and path.startswith(f"{folder.rstrip('/')}/")
        return shlex.quote(os.path.relpath(path, folder) if inside else path)

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
    _check_run_folder(folder)
    problems: list[str] = []

    def attempt(name: str, read: Callable[[Path], T], default: T) -> T:
        path = folder / name
        if not path.exists():
            return default
        try:
            return read(path)
        except ERRORS as error:
            problems.append(f"{name} cannot be read ({' '.join(str(error).split())[:160] or type(error).__name__})")
            return default

    config = attempt(CONFIG, read_text, "")
    options: dict[str, Any] = attempt(CONFIG, read_options, {})
    rows: list[Row] = attempt(METRICS, lambda path: read_rows(path, problems), [])
    evaluation: dict[str, Any] = attempt(EVALUATION, read_object, {})
    splits: dict[str, SplitResult] = {}
    if evaluation:
        splits = attempt(EVALUATION, lambda _: _parse_splits(evaluation), {})
    epochs = [row for row in rows if row["kind"] == "epoch"]
    root = _root(folder)  # it has the attempts of all phases
    latest = f"{latest_attempt_number(root):04}.json"
    return RunRecord(
        folder=folder,
        options=options,
        config=config,
        attempts=read_attempts(root),
        has_phases=any((root / name).is_dir() for name in (PRETRAIN, BASELINE)),
        environment=attempt(os.path.relpath(root / ENVIRONMENT / latest, folder), read_object, {}),
        start=next((row for row in rows if row["kind"] == "start"), None),
        steps=[row for row in rows if row["kind"] == "train"],
        epochs=epochs,
        splits=splits or attempt(METRICS, lambda _: _latest_splits(epochs, rows), {}),
        is_evaluated=bool(splits),
        evaluation=evaluation,
        predictions=attempt(PREDICTIONS, read_predictions, []) if splits else [],
        model=attempt(MODEL, read_model_header, None),
        baseline=attempt(f"{BASELINE}/{EVALUATION}", _read_reported, None),
        blocks=attempt(BLOCKS, read_blocks, []),
        check=attempt(_CHECK, read_object, None),
        problems=problems,
    )


def _check_run_folder(folder: Path) -> None:
    """Raise a UserError if a folder holds no run."""
    try:
        if _holds_run(folder):
            return
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "there is no such folder"
            raise UserError(f"{folder}: {what}; expected a run folder, which has {CONFIG} and {METRICS}")
        runs = sorted(str(path) for path in folder.iterdir() if path.is_dir() and _holds_run(path))
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror or error})") from None
    if runs:
        raise UserError(f"{folder}: not a run folder, but it holds runs; name one or more of {join_truncated(runs)}")
    raise UserError(f"{folder}: not a run folder; expected one with {CONFIG} and {METRICS}")


def _holds_run(folder: Path) -> bool:
    return any((folder / name).is_file() for name in (CONFIG, METRICS, EVALUATION))


def _root(folder: Path) -> Path:
    return folder.parent if folder.name in (PRETRAIN, BASELINE) else folder


def _parse_splits(evaluation: Mapping[str, Any]) -> dict[str, SplitResult]:
    return {str(name): parse_split(str(name), fields) for name, fields in evaluation["splits"].items()}


def _read_reported(path: Path) -> SplitResult | None:
    return _reported(_parse_splits(read_object(path)))


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
