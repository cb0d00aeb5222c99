"""Metrics of a ranking by scores: AUROC and average precision, computed by scikit-learn."""

import importlib.util
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from regraft.contract import available_cores
from trainer.evaluation.predictions import Predictions

INSTALL = "pip install 'regraft[report]' installs scikit-learn"


@dataclass(frozen=True)
class Ranking:
    """One-vs-rest metrics of each class; None where they are undefined, or scikit-learn is not installed."""

    auroc: tuple[float | None, ...]
    average_precision: tuple[float | None, ...]


def has_sklearn() -> bool:
    """Return whether scikit-learn is installed."""
    return importlib.util.find_spec("sklearn") is not None


def rank_classes(predictions: Predictions) -> Ranking:
    """Return how well the probability of each class ranks its examples before all others."""
    classes, total = predictions.logits.shape[1], len(predictions.labels)
    if not has_sklearn():
        return Ranking((None,) * classes, (None,) * classes)
    # Imported here: a run needs it once, at its end, and the import takes a second.
    from sklearn.metrics import average_precision_score, roc_auc_score  # noqa: PLC0415

    def rank(label: int) -> tuple[float | None, float | None]:
        positive = (predictions.labels == label).numpy()
        if not 0 < positive.sum() < total:
            return None, None
        scores = predictions.probability(label).numpy()
        return float(roc_auc_score(positive, scores)), float(average_precision_score(positive, scores))

    _ = predictions.log_normalizer  # computed once, before the threads need it
    with ThreadPoolExecutor(available_cores()) as pool:  # most of the time is spent in sorts, without the GIL
        aurocs, precisions = zip(*pool.map(rank, range(classes)), strict=True)
    return Ranking(aurocs, precisions)


def auroc(higher: Tensor, lower: Tensor) -> float:
    """Return the probability that a score of `higher` exceeds one of `lower`; needs scikit-learn. Ties count half."""
    import numpy as np  # noqa: PLC0415
    from sklearn.metrics import roc_auc_score  # noqa: PLC0415

    truth = np.repeat([True, False], [len(higher), len(lower)])
    return float(roc_auc_score(truth, np.concatenate([higher.numpy(), lower.numpy()])))
