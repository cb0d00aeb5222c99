"""Multinomial logistic regression on features, solved by L-BFGS to convergence: the output layer of a linear probe."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

PENALTIES = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
"""L2 penalties in the order in which they are solved, each from the solution before: strong ones converge fastest."""
_MAX_ITERATIONS = 1000
_TOLERANCE = 1e-6
"""Greatest entry of the gradient at which the solver has converged, for features with variance 1."""


@dataclass(frozen=True)
class Solution:
    """A linear layer, logits = features @ weight.T + bias, for features that are not standardized."""

    weight: Tensor
    """float32 [classes, features]."""
    bias: Tensor
    """float32 [classes]."""
    penalty: float
    """L2 penalty."""
    max_grad: float
    """Greatest entry of the gradient at the end."""
    iterations: int
    """Number of L-BFGS iterations."""

    @property
    def converged(self) -> bool:
        """Return whether the solver has converged."""
        return self.max_grad <= _TOLERANCE


class CVResult(NamedTuple):
    """Result of a cross-validation over penalties on held-out examples."""

    solution: Solution
    """Solution on all examples with the best penalty."""
    losses: dict[float, float]
    """Penalty -> mean loss on the held-out examples, weighted as in `fit`."""
    correct: int
    """Number of correct answers on the held-out examples with the best penalty."""


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

    It minimizes mean cross-entropy + penalty / 2 * |W|^2 by L-BFGS in float64. W are weights for features standardized
    to mean 0 and variance 1; the bias is not penalized. The returned layer includes the standardization. Without an
    intercept, features are scaled to mean square 1, and the bias is 0.

    Args:
        features: [examples, features], on the device to compute on.
        labels: int64 [examples].
        classes: number of classes, including those without examples.
        penalties: above 0.
        weights: [examples], weight of each example's loss, above 0; None: equal weights.
        intercept: whether the layer has a bias.

    """
    mean = features.mean(0, dtype=torch.float64) * intercept
    deviation = (features.to(torch.float64) - mean).pow(2).mean(0).sqrt()
    varies = deviation > 1e-6 * deviation.max().clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(varies, 1 / deviation, 0.0)  # a constant feature gets no weight
    inputs = (features.to(torch.float64) - mean) * scale
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device)
    solutions = []
    for penalty in penalties:
        max_grad, iterations = _minimize(
            inputs, labels, weight=weight, bias=bias if intercept else None, penalty=penalty, weights=weights
        )
        folded = weight * scale
        solutions.append(Solution(folded.float(), (bias - folded @ mean).float(), penalty, max_grad, iterations))
    return solutions


def _minimize(
    inputs: Tensor, labels: Tensor, *, weight: Tensor, bias: Tensor | None, penalty: float, weights: Tensor | None
) -> tuple[float, int]:
    """Minimize over weight and bias, in place. Return (greatest entry of the gradient, number of iterations)."""
    parameters = [tensor.requires_grad_() for tensor in (weight, bias) if tensor is not None]
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=_MAX_ITERATIONS,
        history_size=20,
        tolerance_grad=_TOLERANCE,
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
    max_grad = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return max_grad, int(optimizer.state[weight]["n_iter"])


def _loss(logits: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
    """Return the mean cross-entropy, weighted by example if there are weights."""
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
    """Return the solution on all examples with the penalty that has the lowest loss on the held-out examples.

    Args:
        features: [examples, features].
        labels: int64 [examples].
        classes: number of classes.
        held_out: bool [examples]; some examples must be held out, and some not.
        penalties: candidates, in descending order.
        weights: as in `fit`.
        intercept: as in `fit`.

    """
    fit_weights, held_out_weights = (None if weights is None else weights[mask] for mask in (~held_out, held_out))
    candidates = fit(
        features[~held_out], labels[~held_out], classes, penalties, weights=fit_weights, intercept=intercept
    )
    losses, correct = {}, {}
    for solution in candidates:
        logits = features[held_out].float() @ solution.weight.T + solution.bias
        losses[solution.penalty] = float(_loss(logits, labels[held_out], held_out_weights))
        correct[solution.penalty] = int((logits.argmax(1) == labels[held_out]).sum())
    best = min(losses, key=losses.__getitem__)
    # From the strongest penalty down to the best one, as before: each solution starts from the one before.
    path = [penalty for penalty in penalties if penalty >= best]
    solution = fit(features, labels, classes, path, weights=weights, intercept=intercept)[-1]
    return CVResult(solution, losses, correct[best])
