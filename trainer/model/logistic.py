"""Multinomial logistic regression on features, solved to convergence: the head that a linear probe ends in.

Kumar et al. 2022, Fine-Tuning can Distort Pretrained Features and Underperform Out-of-Distribution (LP-FT): a head that
is right already lets the backbone stay where it is good.
"""

from collections.abc import Sequence
from dataclasses import dataclass

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
    slope: float
    """Greatest entry of the gradient where it ended; above 1e-6 it has not converged."""
    iterations: int

    @property
    def converged(self) -> bool:
        """Return whether the loss was solved."""
        return self.slope <= _FLAT


def solve(features: Tensor, labels: Tensor, classes: int, penalties: Sequence[float]) -> list[Solution]:
    """Return the solution for each penalty, in their order.

    It minimises mean cross-entropy + penalty / 2 * |W|^2 over weights W of features that are brought to mean 0 and
    variance 1 (the bias is free), by L-BFGS in float64, and folds the scaling into the layer that it returns.

    Args:
        features: [examples, features] on any device; the work is done there.
        labels: int64 [examples].
        classes: how many there are, those without an example included.
        penalties: above 0.

    """
    mean = features.mean(0, dtype=torch.float64)
    deviation = (features.to(torch.float64) - mean).pow(2).mean(0).sqrt()
    varies = deviation > 1e-6 * deviation.max().clamp(min=torch.finfo(torch.float64).tiny)
    scale = torch.where(varies, 1 / deviation, 0.0)  # what never varies gets no weight
    inputs = (features.to(torch.float64) - mean) * scale
    weight = torch.zeros(classes, features.shape[1], dtype=torch.float64, device=features.device)
    bias = torch.zeros(classes, dtype=torch.float64, device=features.device)
    found = []
    for penalty in penalties:
        slope, iterations = _minimise(inputs, labels, weight, bias, penalty)
        folded = weight * scale
        found.append(Solution(folded.float(), (bias - folded @ mean).float(), penalty, slope, iterations))
    return found


def _minimise(
    inputs: Tensor, labels: Tensor, weight: Tensor, bias: Tensor, penalty: float
) -> tuple[float, int]:
    """Bring weight and bias to the minimum, in place; returns (greatest slope, iterations)."""
    parameters = [weight.requires_grad_(), bias.requires_grad_()]
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
        value = cross_entropy(inputs @ weight.T + bias, labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(loss)
        loss()
    slope = max(float(p.grad.abs().max()) for p in parameters if p.grad is not None)
    for parameter in parameters:
        parameter.requires_grad_(False)
    return slope, int(optimizer.state[weight]["n_iter"])


def held_out_loss(solution: Solution, features: Tensor, labels: Tensor) -> float:
    """Return the mean cross-entropy on features that the solution has not seen."""
    return float(cross_entropy(features.float() @ solution.weight.T + solution.bias, labels))


def choose(
    features: Tensor, labels: Tensor, classes: int, held_out: Tensor, penalties: Sequence[float] = PENALTIES
) -> tuple[Solution, dict[float, float]]:
    """Return the solution on all examples under the penalty that is best on those held out, and each one's loss there.

    Args:
        features: [examples, features].
        labels: int64 [examples].
        classes: how many there are.
        held_out: bool [examples]; both kinds must exist.
        penalties: those to choose from.

    """
    tried = solve(features[~held_out], labels[~held_out], classes, penalties)
    losses = {
        solution.penalty: held_out_loss(solution, features[held_out], labels[held_out]) for solution in tried
    }
    best = min(losses, key=losses.__getitem__)
    # Down to the best one from the strongest, as before: each begins where the one before ended.
    path = [penalty for penalty in penalties if penalty >= best]
    return solve(features, labels, classes, path)[-1], losses
