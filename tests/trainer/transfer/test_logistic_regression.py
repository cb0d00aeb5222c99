import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.transfer.logistic_regression import PENALTIES, fit, fit_cv


def clouds(
    examples: int, features: int, classes: int, *, seed: int, apart: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Return features with means and scales far apart, as a backbone's are, and their classes."""
    print(f"seed {seed}")
    draw = torch.Generator().manual_seed(seed)
    labels = torch.arange(examples) % classes
    centres = torch.randn(classes, features, generator=draw) * apart
    scales = 10 ** torch.linspace(-2, 2, features)
    return (centres[labels] + torch.randn(examples, features, generator=draw)) * scales + 5 * scales, labels


@pytest.mark.parametrize("penalty", PENALTIES)
def test_nothing_near_a_solution_is_better(penalty: float) -> None:
    features, labels = clouds(90, 12, 3, seed=1)
    (found,) = fit(features, labels, 3, [penalty])
    assert found.converged, found.max_grad
    deviation = features.double().std(0, correction=0)

    def loss(weight: Tensor, bias: Tensor) -> float:
        plain = cross_entropy(features.double() @ weight.T + bias, labels)
        return float(plain + penalty / 2 * (weight * deviation).square().sum())

    best = loss(found.weight.double(), found.bias.double())
    draw = torch.Generator().manual_seed(2)
    for size in (1e-1, 1e-2, 1e-3):
        for _ in range(20):
            step = torch.randn(3, 12, generator=draw, dtype=torch.float64) / deviation * size
            shift = torch.randn(3, generator=draw, dtype=torch.float64) * size
            assert loss(found.weight.double() + step, found.bias.double() + shift) > best - 1e-7


def test_two_classes_are_a_mirror_image_of_each_other() -> None:
    features, labels = clouds(60, 4, 2, seed=3)
    (found,) = fit(features, labels, 2, [1e-2])
    torch.testing.assert_close(found.weight[0], -found.weight[1], rtol=1e-4, atol=1e-5)


def test_a_warm_start_ends_where_a_cold_one_does() -> None:
    features, labels = clouds(90, 8, 3, seed=4)
    warm = fit(features, labels, 3, [1.0, 1e-1, 1e-2])[-1]
    (cold,) = fit(features, labels, 3, [1e-2])
    torch.testing.assert_close(
        warm.weight * features.std(0), cold.weight * features.std(0), rtol=1e-3, atol=1e-4
    )


def test_a_feature_that_never_varies_gets_no_weight() -> None:
    features, labels = clouds(60, 5, 3, seed=5)
    features[:, 2] = 7.0
    (found,) = fit(features, labels, 3, [1e-2])
    assert found.weight[:, 2].abs().max() == 0
    assert torch.isfinite(found.weight).all()


def test_a_class_without_examples_is_never_predicted() -> None:
    features, labels = clouds(60, 5, 3, seed=6)
    (found,) = fit(features, labels, 4, [1e-2])
    assert (features @ found.weight.T + found.bias).argmax(1).max() < 3


def test_the_penalty_that_is_chosen_is_the_best_on_what_was_held_out() -> None:
    features, labels = clouds(120, 60, 3, seed=7, apart=0.3)
    held_out = torch.arange(120) % 5 == 0
    found, losses, correct = fit_cv(features, labels, 3, held_out)
    assert found.penalty == min(losses, key=losses.__getitem__)
    assert set(losses) == set(PENALTIES)
    (again,) = fit(features[~held_out], labels[~held_out], 3, [found.penalty])
    logits = features[held_out] @ again.weight.T + again.bias
    assert float(cross_entropy(logits, labels[held_out])) == pytest.approx(losses[found.penalty], rel=1e-3)
    assert correct == (logits.argmax(1) == labels[held_out]).sum()
    assert losses[found.penalty] < min(losses[PENALTIES[0]], losses[PENALTIES[-1]]), "neither end of the row"


@pytest.mark.parametrize("intercept", [True, False])
def test_an_example_of_weight_three_counts_as_three(intercept: bool) -> None:
    features, labels = clouds(60, 4, 3, seed=8)
    features = (features - features.mean(0)) / features.std(0)
    again = torch.cat([torch.arange(60), torch.arange(20), torch.arange(20)])
    # The scale of the features is that of the examples as they are: no penalty, so that it does not matter.
    (thrice,) = fit(features[again], labels[again], 3, [1e-9], intercept=intercept)
    weights = torch.ones(60)
    weights[:20] = 3.0
    (weighted,) = fit(features, labels, 3, [1e-9], weights=weights, intercept=intercept)
    (plain,) = fit(features, labels, 3, [1e-9], intercept=intercept)
    logits = [features @ s.weight.T + s.bias for s in (thrice, weighted, plain)]
    first, second, other = (each.log_softmax(1) for each in logits)
    torch.testing.assert_close(second, first, rtol=1e-3, atol=1e-3)
    assert (other - first).abs().max() > 0.01


def test_without_an_intercept_the_bias_is_0_and_the_slope_is_still_flat() -> None:
    features, labels = clouds(90, 6, 3, seed=9)
    (found,) = fit(features, labels, 3, [1e-2], intercept=False)
    assert found.converged, found.max_grad
    assert found.bias.abs().max() == 0
    scale = features.double().square().mean(0).sqrt()
    weight = found.weight.double().requires_grad_()
    loss = cross_entropy(features.double() @ weight.T, labels) + 0.005 * (weight * scale).square().sum()
    loss.backward()
    assert weight.grad is not None
    assert (weight.grad / scale).abs().max() < 1e-5
