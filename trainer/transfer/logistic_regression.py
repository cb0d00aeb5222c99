"""Multinomial logistic regression on features, solved to convergence: the head that a linear probe ends in.

Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution (LP-FT): a head that
is right already lets the backbone stay where it is good.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PENALTIES = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
"""Tried in this order, each from the solution before: the strongest is the easiest."""
_MOST_ITERATIONS = 1000
_FLAT = 1e-6
"""Greatest slope at which the loss counts as solved, of features with variance 1."""


@dataclass(frozen=True)
class Solution:
    """A linear layer: logits = features @ weight.T + bias, on features as they are."""

    weight: Tensor
    """float32 [classes, features]."""
    bias: Tensor
    """float32 [classes]."""
    penalty: float
    max_grad: float
    """Greatest entry of the gradient where it ended; above 1e-6 it has not converged."""
    iterations: int

    @property
    def converged(self) -> bool:
        """Return whether the loss was solved."""
        return self.max_grad <= _FLAT


class CVResult(NamedTuple):
    """A solution under the penalty that did best on examples held out."""

    solution: Solution
    losses: dict[float, float]
    """Penalty -> mean loss on the examples held out, weighted as in `solve`."""
    correct: int
    """Right answers on them, of the solution that had not seen them."""


def fit(
    features: Tensor,
    labels: Tensor,
    classes: int,
    penalties: Sequence[float],
    *,
    weights: Tensor | None = None,
    intercept: bool = True,
) -> list[Solution]:
    """Return the solution for each penalty, in their order.

    It minimises mean cross-entropy + penalty / 2 * |W|^2 over weights W of features that are brought to mean 0 and
    variance 1 (the bias is free), by L-BFGS in float64, and folds the scaling into the layer that it returns.
    Without an intercept they are brought to mean square 1, and the bias is 0.

    Args:
        features: [examples, features] on any device; the work is done there.
        labels: int64 [examples].
        classes: how many there are, those without an example included.
        penalties: above 0.
        weights: [examples] of each one's loss, above 0, whose mean over them is divided by; None: all alike.
        intercept: whether the layer has a bias.

    """
    mean = features.mean(0, dtype=torch.float64) * intercept
    deviation = (features.to(torch.float64) - mean).pow(2).mean(0).sqrt()
    varies = deviation > 1e-6 * deviation.max().clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(varies, 1 / deviation, 0.0)  # what never varies gets no weight
    inputs = (features.to(torch.float64) - mean) * scale
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device)
    found = []
    for penalty in penalties:
        slope, iterations = _minimize(
            inputs,
            labels,
            weight=weight,
            bias=bias if intercept else None,
            penalty=penalty,
            weights=weights,
        )
        folded = weight * scale
        found.append(Solution(folded.float(), (bias - folded @ mean).float(), penalty, slope, iterations))
    return found


def _minimize(
    inputs: Tensor,
    labels: Tensor,
    *,
    weight: Tensor,
    bias: Tensor | None,
    penalty: float,
    weights: Tensor | None,
) -> tuple[float, int]:
    """Bring weight and bias to the minimum, in place; returns (greatest slope, iterations)."""
    parameters = [tensor.requires_grad_() for tensor in (weight, bias) if tensor is not None]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_MOST_ITERATIONS,
        history_size=20,
        tolerance_grad=_FLAT,
        tolerance_change=0.0,
        line_search_fn="strong_wolfe",
    )

    def loss() -> Tensor:
        optimizer.zero_grad()
        logits = inputs @ weight.T if bias is None else inputs @ weight.T + bias
        value = _loss(logits, labels, weights) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    slope = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return slope, int(optimizer.state[weight]["n_iter"])


def _loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean cross-entropy; of weighted examples, the weighted mean."""
    if weights is None:
        return cross_entropy(logits, labels)
    return (cross_entropy(logits, labels, reduction="none") * weights).sum() / weights.sum()


def fit_cv(
    features: Tensor,
    labels: Tensor,
    classes: int,
    held_out: Tensor,
    penalties: Sequence[float] = PENALTIES,
    *,
    weights: Tensor | None = None,
    intercept: bool = True,
) -> CVResult:
    """Return the solution on all examples under the penalty that is best on those held out.

    Args:
        features: [examples, features].
        labels: int64 [examples].
        classes: how many there are.
        held_out: bool [examples]; both kinds must exist.
        penalties: those to choose from.
        weights: as in `solve`.
        intercept: as in `solve`.

    """
    seen, unseen = (None if weights is None else weights[part] for part in (~held_out, held_out))
    tried = fit(features[~held_out], labels[~held_out], classes, penalties, weights=seen, intercept=intercept)
    losses, correct = {}, {}
    for solution in tried:
        logits = features[held_out].float() @ solution.weight.T + solution.bias
        losses[solution.penalty] = float(_loss(logits, labels[held_out], unseen))
        correct[solution.penalty] = int((logits.argmax(1) == labels[held_out]).sum())
    best = min(losses, key=losses.__getitem__)
    # Down to the best one from the strongest, as before: each begins where the one before ended.
    path = [penalty for penalty in penalties if penalty >= best]
    found = fit(features, labels, classes, path, weights=weights, intercept=intercept)[-1]
    return CVResult(found, losses, correct[best])
