"""Metrics of a ranking by scores: AUROC and average precision.

scikit-learn computes the same values (the tests compare them). Its import takes 1.7 s at the end of every run, which is
a tenth of a short one.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from regraft.contract import available_cores
from trainer.evaluation.predictions import Predictions


@dataclass(frozen=True)
class Ranking:
    """One-vs-rest metrics of each class; None for a class that has no example, or all of them."""

    auroc: tuple[float | None, ...]
    average_precision: tuple[float | None, ...]


def rank_classes(predictions: Predictions) -> Ranking:
    """Return how well the probability of each class ranks its examples before all others."""
    classes, total = predictions.logits.shape[1], len(predictions.labels)

    def rank(label: int) -> tuple[float | None, float | None]:
        positive = predictions.labels == label
        if not 0 < int(positive.sum()) < total:
            return None, None
        return _rank(predictions.probability(label), positive)

    _ = predictions.log_normalizer  # computed once, before the threads need it
    with ThreadPoolExecutor(available_cores()) as pool:  # most of the time is spent in sorts, without the GIL
        aurocs, precisions = zip(*pool.map(rank, range(classes)), strict=True)
    return Ranking(aurocs, precisions)


def auroc(higher: Tensor, lower: Tensor) -> float:
    """Return the probability that a score of `higher` exceeds one of `lower`. Ties count half."""
    positive = torch.cat([torch.ones_like(higher, dtype=torch.bool), torch.zeros_like(lower, dtype=torch.bool)])
    return _rank(torch.cat([higher, lower]), positive)[0]


def _rank(scores: Tensor, positive: Tensor) -> tuple[float, float]:
    """Return AUROC and average precision of scores, float [N], of positive and other examples, bool [N].

    Average precision is the sum of (R_i - R_(i-1)) P_i over the thresholds i, from the highest score to the lowest, of
    recall R and precision P, without interpolation.
    """
    ordered, order = scores.sort(descending=True)
    last = torch.ones_like(positive)  # the last example of each threshold: equal scores share one
    last[:-1] = ordered[1:] != ordered[:-1]
    accepted = last.nonzero().squeeze(1) + 1
    true_positives = positive[order].cumsum(0)[accepted - 1]
    zero = accepted.new_zeros(1)
    of_threshold = true_positives.diff(prepend=zero).double()  # positive examples with exactly this score
    false_positives = accepted - true_positives
    num_positive, num_other = int(true_positives[-1]), int(false_positives[-1])
    area = torch.trapezoid(
        torch.cat([zero, true_positives]).double(), torch.cat([zero, false_positives]).double()
    ).item() / (num_positive * num_other)
    precision = (of_threshold * true_positives / accepted).sum().item() / num_positive
    return area, precision
