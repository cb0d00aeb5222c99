"""Report of a split: all metrics of its predictions, as an object and as JSON."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from trainer.evaluate import Evaluation
from trainer.evaluation.calibration import ReliabilityBin, expected_calibration_error, reliability_bins
from trainer.evaluation.predictions import Predictions
from trainer.evaluation.ranking import Ranking, rank_classes
from trainer.report.metrics import class_columns

TOP = 5
MAX_MATRIX = 1000
"""Greatest number of classes whose confusion matrix is written."""


@dataclass(frozen=True, kw_only=True)
class SplitReport:
    """Metrics of the predictions of one split."""

    classes: tuple[str, ...]
    evaluation: Evaluation
    """Counts, loss, and the metrics that follow from them."""
    num_in_top: int | None
    """Number of examples whose label is among the five most probable classes; None with five classes or fewer."""
    confusion: tuple[tuple[int, ...], ...] | None
    """Count of each label (row) and predicted class (column); None with more than 1000 classes."""
    reliability: tuple[ReliabilityBin, ...]
    ranking: Ranking

    @property
    def top5_accuracy(self) -> float | None:
        """Return the fraction of examples whose label is among the five most probable classes."""
        return None if self.num_in_top is None else self.num_in_top / self.evaluation.seen

    @property
    def ece(self) -> float:
        """Return the expected calibration error."""
        return expected_calibration_error(self.reliability)

    @property
    def auroc_macro(self) -> float | None:
        """Return the mean one-vs-rest AUROC of the classes that have one."""
        return _mean(self.ranking.auroc)

    @property
    def average_precision_macro(self) -> float | None:
        """Return the mean average precision of the classes that have one."""
        return _mean(self.ranking.average_precision)

    def to_fields(self) -> dict[str, Any]:
        """Return the report as a JSON object."""
        evaluation = self.evaluation
        return {
            "examples": evaluation.seen,
            "correct": sum(evaluation.correct),
            "accuracy": evaluation.accuracy,
            "accuracy_interval": list(evaluation.interval),
            "top5_accuracy": self.top5_accuracy,
            "balanced_accuracy": evaluation.balanced_accuracy,
            "f1_macro": evaluation.f1_macro,
            "log_loss": evaluation.loss,
            "ece": self.ece,
            "auroc_macro": self.auroc_macro,
            "average_precision_macro": self.average_precision_macro,
            "per_class": {
                **class_columns(evaluation, self.classes),
                "auroc": list(self.ranking.auroc),
                "average_precision": list(self.ranking.average_precision),
            },
            "confusion_matrix": None if self.confusion is None else [list(row) for row in self.confusion],
            "reliability": [dataclasses.asdict(entry) for entry in self.reliability],
        }


def make_report(predictions: Predictions, classes: Sequence[str]) -> SplitReport:
    """Return the metrics of predictions."""
    count = len(classes)
    confusion = None
    if count <= MAX_MATRIX:
        pairs = torch.bincount(predictions.labels * count + predictions.predicted, minlength=count * count)
        confusion = tuple(tuple(row) for row in pairs.view(count, count).tolist())
    return SplitReport(
        classes=tuple(classes),
        evaluation=predictions.evaluation(),
        num_in_top=predictions.num_in_top(TOP) if count > TOP else None,
        confusion=confusion,
        reliability=reliability_bins(predictions),
        ranking=rank_classes(predictions),
    )


def to_json(fields: Mapping[str, Any]) -> str:
    """Return a JSON object with a line for each entry, and for each entry of an object or a matrix in it."""

    def render(value: Any, depth: int) -> str:
        pad = " " * depth
        if isinstance(value, Mapping) and value:
            lines = (f"{pad} {json.dumps(key)}: {render(entry, depth + 1)}" for key, entry in value.items())
            return "{\n" + ",\n".join(lines) + f"\n{pad}}}"
        if isinstance(value, list | tuple) and value and isinstance(value[0], list | Mapping):
            lines = (f"{pad} {json.dumps(entry, allow_nan=False)}" for entry in value)
            return "[\n" + ",\n".join(lines) + f"\n{pad}]"
        return json.dumps(value, allow_nan=False)

    return render(fields, 0) + "\n"


def _mean(values: Iterable[float | None]) -> float | None:
    defined = [value for value in values if value is not None]
    return sum(defined) / len(defined) if defined else None
