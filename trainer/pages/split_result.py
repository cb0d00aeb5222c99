"""The result on one split, from evaluation.json or from metrics.jsonl, validated."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

_OTHERS = (
    "top5_accuracy",
    "balanced_accuracy",
    "f1_macro",
    "log_loss",
    "ece",
    "auroc_macro",
    "average_precision_macro",
)


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """The metrics of one class."""

    name: str
    support: int
    """Number of images."""
    predicted: int
    """How often it was predicted."""
    correct: int
    precision: float
    recall: float
    f1: float
    auroc: float | None = None


@dataclass(frozen=True)
class ReliabilityBin:
    """The predictions in one interval of confidence."""

    low: float
    high: float
    count: int
    confidence: float | None
    accuracy: float | None


@dataclass(frozen=True)
class Confusion:
    """How often the images of one class are predicted as another one."""

    label: str
    predicted: str
    count: int
    support: int
    """Images of the class `label`."""
    reverse: int
    """Images of `predicted` that are predicted as `label`."""

    @property
    def fraction(self) -> float:
        """Return the fraction of the images of the class."""
        return self.count / max(1, self.support)


@dataclass(frozen=True, kw_only=True)
class SplitResult:
    """The result on one split."""

    split: str
    examples: int
    correct: int
    accuracy: float
    interval: tuple[float, float]
    metrics: Mapping[str, float | None]
    """Other metrics: `top5_accuracy`, `balanced_accuracy`, `f1_macro`, `log_loss`, `ece`, `auroc_macro`, ..."""
    classes: Sequence[ClassResult]
    matrix: Sequence[Sequence[int]] | None = None
    """Confusion matrix: count of each label (row) and predicted class (column)."""
    reliability: Sequence[ReliabilityBin] = ()

    def confusions(self) -> list[Confusion]:
        """Return the pairs of classes that are confused, the most frequent first."""
        matrix = self.matrix or ()
        found = [
            Confusion(self.classes[i].name, self.classes[j].name, count, self.classes[i].support, matrix[j][i])
            for i, row in enumerate(matrix)
            for j, count in enumerate(row)
            if count and i != j
        ]
        return sorted(found, key=lambda pair: (-pair.count, -pair.fraction))


def parse_split(split: str, fields: Mapping[str, Any]) -> SplitResult:
    """Return an entry of `splits` in evaluation.json.

    Raises:
        ValueError, TypeError, LookupError: it is damaged.

    """
    per_class = fields["per_class"]
    classes = _parse_classes(per_class, per_class.get("auroc"))
    matrix = fields.get("confusion_matrix")
    if matrix is not None:
        matrix = [[_count(value) for value in row] for row in matrix]
        if len(matrix) != len(classes) or any(len(row) != len(classes) for row in matrix):
            raise ValueError(f"confusion_matrix of {split} is not square")
    low, high = fields["accuracy_interval"]
    return SplitResult(
        split=split,
        examples=_count(fields["examples"]),
        correct=_count(fields["correct"]),
        accuracy=_float(fields["accuracy"]),
        interval=(_float(low), _float(high)),
        metrics={name: _optional(fields.get(name)) for name in _OTHERS},
        classes=classes,
        matrix=matrix,
        reliability=parse_reliability(fields.get("reliability", ())),
    )


def parse_reliability(entries: Sequence[Mapping[str, Any]]) -> list[ReliabilityBin]:
    """Return the bins of a reliability diagram.

    Raises:
        ValueError, TypeError, LookupError: one of them is damaged.

    """
    return [
        ReliabilityBin(
            _float(entry["low"]), _float(entry["high"]), _count(entry["count"]),
            _optional(entry["confidence"]), _optional(entry["accuracy"]),
        )
        for entry in entries
    ]  # fmt: skip


def parse_classes_row(row: Mapping[str, Any], epoch: Mapping[str, Any]) -> SplitResult:
    """Return the result of an epoch, from its row of kind `classes` and its row of kind `epoch` in metrics.jsonl.

    Raises:
        ValueError, TypeError, LookupError: one of them is damaged.

    """
    split = str(row["split"])
    low, high = epoch[f"{split}_interval"]
    return SplitResult(
        split=split,
        examples=_count(epoch[f"{split}_seen"]),
        correct=_count(epoch[f"{split}_correct"]),
        accuracy=_float(epoch[f"{split}_accuracy"]),
        interval=(_float(low), _float(high)),
        metrics={
            "balanced_accuracy": _optional(epoch.get(f"{split}_balanced_accuracy")),
            "f1_macro": _optional(epoch.get(f"{split}_f1_macro")),
            "log_loss": _optional(epoch.get(f"{split}_loss")),
        },
        classes=_parse_classes(row, None),
    )


def _parse_classes(fields: Mapping[str, Any], auroc: Sequence[Any] | None) -> list[ClassResult]:
    names = [str(name) for name in fields["classes"]]
    columns = zip(
        names,
        *(fields[key] for key in ("support", "predicted", "correct", "precision", "recall", "f1")),
        auroc if auroc is not None else [None] * len(names),
        strict=True,
    )
    return [
        ClassResult(
            name=name,
            support=_count(support),
            predicted=_count(predicted),
            correct=_count(correct),
            precision=_float(precision),
            recall=_float(recall),
            f1=_float(f1),
            auroc=_optional(area),
        )
        for name, support, predicted, correct, precision, recall, f1, area in columns
    ]


def _float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _optional(value: Any) -> float | None:
    return None if value is None else _float(value)


def _count(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r} is not a count")
    return value
