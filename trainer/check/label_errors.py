"""Find likely label errors by confident learning, from out-of-fold predictions of a linear probe.

Source: C. Northcutt, L. Jiang, I. Chuang, "Confident Learning: Estimating Uncertainty in Dataset Labels", JAIR 2021. An
example counts as an error if it is confidently of another class: its probability of that class is at least the mean
probability of the class over the examples labeled so. Errors are ranked by their normalized margin.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.errors import UserError
from trainer.seeds import derive_seed
from trainer.transfer.logistic_regression import fit

_PENALTIES = (1e2, 1e1, 1e0, 1e-1, 1e-2)
"""L2 penalties; weaker ones would fit the errors."""
_FOLDS = 5


@dataclass(frozen=True)
class LabelScores:
    """How well the labels of N examples agree with out-of-fold predictions."""

    suggested: np.ndarray
    """int64 [N], the class with the largest probability besides the label."""
    margin: np.ndarray
    """float64 [N], probability of the label minus that of the suggested class: the lower, the more likely an error."""
    is_error: np.ndarray
    """bool [N], whether the example is confidently of the suggested class."""
    accuracy: float
    """Accuracy of the out-of-fold predictions, measured by the given labels."""

    @property
    def ranking(self) -> np.ndarray:
        """Return the positions of the examples, the most likely errors first."""
        return np.asarray(np.argsort(self.margin, kind="stable"))

    @property
    def errors(self) -> np.ndarray:
        """Return the positions of the likely errors, the most likely first."""
        ranking = self.ranking
        return np.asarray(ranking[self.is_error[ranking]])


def score_labels(features: np.ndarray, labels: Sequence[int], groups: Sequence[int], *, seed: int) -> LabelScores:
    """Return how well labels agree with the predictions of a linear probe that has not seen the example or its group.

    Args:
        features: embeddings, float32 [N, D].
        labels: class of each example, from 0.
        groups: number of each example's group, whose examples are all in one fold: duplicates, patients.
        seed: of the folds.

    Raises:
        UserError: the dataset is too small to be divided into folds.

    """
    targets = torch.tensor(labels)
    probabilities = _predict_out_of_fold(torch.from_numpy(features), targets, np.asarray(groups), seed).numpy()
    given = targets.numpy()
    rows = np.arange(len(given))
    of_label = probabilities[rows, given]
    thresholds = np.full(probabilities.shape[1], np.inf)
    for label in np.unique(given):
        thresholds[label] = probabilities[given == label, label].mean()
    others = probabilities.copy()
    others[rows, given] = -1
    suggested = others.argmax(axis=1)
    # The confident joint: the most probable of the classes whose probability reaches their threshold.
    confident = np.where(probabilities >= thresholds, probabilities, -1)
    is_error = (confident.max(axis=1) >= 0) & (confident.argmax(axis=1) != given)
    suggested[is_error] = confident.argmax(axis=1)[is_error]
    return LabelScores(
        suggested=suggested,
        margin=of_label - probabilities[rows, suggested],
        is_error=is_error,
        accuracy=float((probabilities.argmax(axis=1) == given).mean()),
    )


def _predict_out_of_fold(features: Tensor, labels: Tensor, groups: np.ndarray, seed: int) -> Tensor:
    """Return the probabilities of the classes, float64 [N, K]."""
    from sklearn.model_selection import StratifiedGroupKFold  # noqa: PLC0415 (optional, and slow to import)

    folds = min(_FOLDS, len({*groups.tolist()}), int(labels.bincount().max()))
    if folds < 2:
        raise UserError(
            f"label errors cannot be found in {len(labels)} images: expected a class with two images, and two groups"
        )
    classes = int(labels.max()) + 1
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=derive_seed("label errors", seed) % 2**32)
    with warnings.catch_warnings(action="ignore"):  # of classes with fewer images than folds
        splits = [torch.from_numpy(held_out) for _, held_out in splitter.split(features, labels, groups)]
    probabilities = torch.zeros(len(labels), classes, dtype=torch.float64)
    penalties: Sequence[float] = _PENALTIES
    for number, held_out in enumerate(splits):
        is_training = torch.ones(len(labels), dtype=torch.bool)
        is_training[held_out] = False
        solutions = fit(features[is_training], labels[is_training], classes, penalties)
        logits = [features[held_out] @ solution.weight.T + solution.bias for solution in solutions]
        if number == 0:  # its best penalty is that of all folds; `fit` solves each from the stronger ones on
            losses = [float(cross_entropy(each, labels[held_out])) for each in logits]
            penalties = penalties[: int(np.argmin(losses)) + 1]
        probabilities[held_out] = logits[len(penalties) - 1].double().softmax(1)
    return probabilities
