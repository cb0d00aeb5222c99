import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.transfer.logistic_regression import PENALTIES, fit, fit_cv


def clusters(examples: int, features: int, classes: int, *, seed: int, distance: float = 1.0) -> tuple[Tensor, Tensor]:
    """Return features of very different means and scales, as a backbone's are, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(examples) % classes
    centers = torch.randn(classes, features, generator=generator) * distance
    scales = 10 ** torch.linspace(-2, 2, features)
    noise = torch.randn(examples, features, generator=generator)
    return (centers[labels] + noise) * scales + 5 * scales, labels


@pytest.mark.parametrize("intercept", [True, False])
def test_the_gradient_of_the_penalized_loss_is_zero_for_every_penalty(intercept: bool) -> None:
    """The loss is convex, so that is its minimum."""
    features, labels = clusters(90, 12, 3, seed=1)
    solutions = fit(features, labels, 3, PENALTIES, intercept=intercept)
    features = features.double()
    mean = features.mean(0) * intercept
    scale = features.std(0, correction=0) if intercept else features.square().mean(0).sqrt()
    for solution in solutions:
        assert solution.converged, solution.max_grad
        weight, bias = (tensor.double().requires_grad_() for tensor in (solution.weight, solution.bias))
        loss = cross_entropy(features @ weight.T + bias, labels)
        loss = loss + solution.penalty / 2 * (weight * scale).square().sum()
        weight_grad, bias_grad = torch.autograd.grad(loss, (weight, bias))
        assert ((weight_grad - bias_grad[:, None] * mean) / scale).abs().max() < 1e-5
        assert bias_grad.abs().max() < 1e-5 if intercept else not solution.bias.any()


def test_constant_features_and_empty_classes_are_ignored() -> None:
    features, labels = clusters(60, 5, 3, seed=5)
    features[:, 2] = 7.0
    (solution,) = fit(features, labels, 4, [1e-2])  # the fourth class has no examples
    assert solution.weight[:, 2].abs().max() == 0
    assert torch.isfinite(solution.weight).all()
    assert (features @ solution.weight.T + solution.bias).argmax(1).max() < 3


def test_the_penalty_with_the_lowest_held_out_loss_is_selected() -> None:
    features, labels = clusters(120, 60, 3, seed=7, distance=0.3)
    held_out = torch.arange(120) % 5 == 0
    solution, losses, correct = fit_cv(features, labels, 3, held_out)
    assert solution.penalty == min(losses, key=losses.__getitem__)
    assert set(losses) == set(PENALTIES)
    (reference,) = fit(features[~held_out], labels[~held_out], 3, [solution.penalty])
    logits = features[held_out] @ reference.weight.T + reference.bias
    expected = float(cross_entropy(logits, labels[held_out]))
    assert losses[solution.penalty] == pytest.approx(expected, rel=1e-3)
    assert correct == (logits.argmax(1) == labels[held_out]).sum()
    ends = (losses[PENALTIES[0]], losses[PENALTIES[-1]])
    assert losses[solution.penalty] < min(ends), "the data make neither end of the list the best"


@pytest.mark.parametrize("intercept", [True, False])
def test_a_weight_of_three_equals_three_copies(intercept: bool) -> None:
    features, labels = clusters(60, 4, 3, seed=8)
    features = (features - features.mean(0)) / features.std(0)
    copies = torch.cat([torch.arange(60), torch.arange(20), torch.arange(20)])
    weights = torch.ones(60)
    weights[:20] = 3.0
    # Almost no penalty, since copies change the standardization and weights do not.
    (copied,) = fit(features[copies], labels[copies], 3, [1e-9], intercept=intercept)
    (weighted,) = fit(features, labels, 3, [1e-9], weights=weights, intercept=intercept)
    (plain,) = fit(features, labels, 3, [1e-9], intercept=intercept)
    expected, log_probs, unweighted = (
        (features @ s.weight.T + s.bias).log_softmax(1) for s in (copied, weighted, plain)
    )
    torch.testing.assert_close(log_probs, expected, rtol=1e-3, atol=1e-3)
    assert (unweighted - expected).abs().max() > 0.01
