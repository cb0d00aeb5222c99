"""Rows of metrics.jsonl as entries for experiment trackers: scalar values under names that every tracker accepts."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trainer.report.metrics import Row
from trainer.text import escape_unprintable

MAX_CLASSES = 100
"""Of a data set with more classes, the metrics of each class are not sent: a tracker could not show them."""
_MAX_NAME_LENGTH = 100
_SPLITS = ("train", "val", "test")
_KINDS = ("start", "train", "epoch", "final")
_NOT_CURVES = ("_seen", "_correct", "_interval")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """What is sent to a tracker at once."""

    step: int
    """Number of updates completed."""
    kind: str
    """Kind of the row of metrics.jsonl; `final` after the evaluation of the model file."""
    values: dict[str, float]
    pictures: dict[str, Path] = field(default_factory=dict)
    """Name -> PNG file."""

    @property
    def position(self) -> tuple[int, int]:
        """Return the place of the entry in the run; a resumed run repeats entries up to some position."""
        return self.step, _KINDS.index(self.kind)


def to_entries(rows: Iterable[Row]) -> list[Entry]:
    """Return rows of metrics.jsonl as entries. The metrics of each class belong to the entry of their epoch."""
    entries: list[Entry] = []
    for row in rows:
        if row["kind"] == "classes":
            if entries:
                entries[-1].values.update(_class_values(row))
        elif row["kind"] in _KINDS:
            entries.append(Entry(step=row["step"], kind=row["kind"], values=_values(row)))
    return entries


def final_position(step: int) -> tuple[int, int]:
    """Return the position of the last entry of a run of `step` updates."""
    return step, _KINDS.index("final")


def final_entry(step: int, evaluation: Any, pictures: dict[str, Path]) -> Entry:
    """Return the entry of evaluation.json, `evaluation`: the metrics of the model file on each split."""
    values = {
        f"final/{split}_{key}": float(value)
        for split, metrics in evaluation["splits"].items()
        for key, value in metrics.items()
        if _is_number(value)
    }
    return Entry(step=step, kind="final", values=values, pictures=pictures)


def _values(row: Row) -> dict[str, float]:
    # The last step of an epoch has a row of its own, with the training metrics and the speed of the epoch.
    left_out = ("step", "seconds") if row["kind"] == "train" else ("step", "train_", "lr_", "examples_", "memory_")
    return {
        _name(key): float(value)
        for key, value in row.items()
        if _is_number(value) and not key.startswith(left_out) and not key.endswith(_NOT_CURVES)
    }


def _name(key: str) -> str:
    """Return the name of a column in a tracker, which groups names by what stands before the slash."""
    prefix, _, rest = key.partition("_")
    if rest and prefix in (*_SPLITS, "lr"):
        return f"{prefix}/{rest}"
    return key if key == "epoch" else f"speed/{key}"


def _class_values(row: Row) -> dict[str, float]:
    names = class_names(row["classes"])
    if len(names) > MAX_CLASSES:
        return {}
    return {
        f"{row['split']}_{metric}/{name}": value
        for metric in ("precision", "recall", "f1")
        for name, value in zip(names, row[metric], strict=True)
    }


def class_names(classes: Sequence[str]) -> list[str]:
    """Return names of classes with letters, digits, spaces, `_`, `-` and `.` alone, all of them different."""
    names: list[str] = []
    taken: set[str] = set()
    for position, name in enumerate(classes):
        shown = re.sub(r"[^\w .-]", "_", escape_unprintable(name))[:_MAX_NAME_LENGTH].strip(" .") or "_"
        if shown in taken:
            shown = f"{shown}_{position}"
        taken.add(shown)
        names.append(shown)
    return names


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
