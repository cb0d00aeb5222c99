import math
import re

import numpy as np
import pytest

from trainer.commands.lr_range import SMOOTHING, has_diverged, rates, smoothed, suggest
from trainer.commands.overfit import describe_losses


def test_rates_are_a_geometric_sequence_and_averages_have_no_bias_towards_0() -> None:
    assert rates(1e-6, 10, 8) == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10])
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    assert smoothed([1.0, 2.0]) == pytest.approx([1, (SMOOTHING * 1 + 2) / (SMOOTHING + 1)])


def test_loss_diverges_far_above_its_best_value_or_if_not_finite() -> None:
    assert not has_diverged([1.0, 2.0, 3.9])
    falling = [4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert not has_diverged([*falling, 3.0]), "one batch, smoothed"
    assert has_diverged([*falling, 30.0])
    assert has_diverged([1.0, math.nan])
    assert has_diverged([math.inf])


def curve(tried: list[float], *, knee: float, end: float) -> list[float]:
    """Return losses that fall from 2 to 0.2 around the rate `knee`, and explode above `end`."""
    return [0.2 + 1.8 / (1 + (rate / knee) ** 2) + (10 * rate / end if rate > end else 0.0) for rate in tried]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_suggestion_is_the_larger_rate_and_at_most_a_third_of_the_minimums(scale: float) -> None:
    tried = rates(1e-6 * scale, 1 * scale, 121)
    early = suggest(tried, curve(tried, knee=1e-3 * scale, end=0.5 * scale))
    assert early.steepest is not None
    assert 1e-3 * scale < early.steepest < 4e-3 * scale, "at the knee, with the lag of the average"
    assert early.lr == early.tenth > early.steepest
    assert "a tenth" in early.reason
    late = suggest(tried, curve(tried, knee=1e-2 * scale, end=3e-2 * scale))
    assert late.tenth is not None
    assert late.lr == late.steepest is not None
    assert late.tenth < late.lr <= late.tenth * 10 / 3 * (1 + 1e-12)
    assert "falls fastest at this rate" in late.reason


def test_losses_after_an_explosion_are_ignored() -> None:
    tried = rates(1e-6, 1, 61)
    losses = zip(tried, curve(tried, knee=1e-4, end=10), strict=True)
    exploded = [loss if rate < 1e-2 else (8.0 if rate < 3e-2 else 0.0) for rate, loss in losses]
    suggestion = suggest(tried, exploded)
    assert suggestion.tenth is not None
    assert suggestion.tenth < 1e-3, "the minimum before the explosion, not the lower loss after it"


# Losses of ants and bees, three images of each: of a pretrained squeezenet1_1 in batches of 1 and 2, and of a random
# shufflenet_v2_x0_5 in batches of 6 and 1. The rates are 1e-7 at first, and would not change the model yet.
FEW_IMAGES = [
    [27.43, 0, 0, 0, 19.49, 0.29, 40.41, 0, 12, 27, 0, 0, 0, 38],
    [13.72, 0.58, 0.39, 38.28, 0, 4.51, 11.1, 0, 17.23, 11.64, 12.45, 0, 7.12, 0.82, 12.94, 0.01],
    [0.61, 1.25, 0.82, 0.69, 0.65, 0.79, 0.62, 0.53, 0.76, 0.6, 0.5, 0.65, 0.63, 0.83, 0.72, 0.86, 0.86, 0.64],
    [0.92, 0.46, 0.92, 0.51, 0.48, 0.91, 0.96, 0.91, 0.51, 0.55, 0.53, 0.91, 0.96, 0.99, 0.88, 0.6, 0.59, 0.64],
]


@pytest.mark.parametrize("losses", FEW_IMAGES)
def test_noise_of_few_images_is_neither_divergence_nor_a_suggestion(losses: list[float]) -> None:
    assert not any(has_diverged(losses[: count + 1]) for count in range(len(losses)))
    assert suggest(rates(1e-7, 1e-5, len(losses)), losses).lr is None
    assert has_diverged([*losses, 1e4])


@pytest.mark.parametrize("losses", [[2.0] * 20, list(np.linspace(2, 7, 20)), [2.0, 1.95] * 10, [], [2.0]])
def test_no_suggestion_if_the_loss_does_not_fall(losses: list[float]) -> None:
    suggestion = suggest(rates(1e-5, 1, 20)[: len(losses)], losses)
    assert (suggestion.lr, suggestion.steepest, suggestion.tenth) == (None, None, None)
    assert "--from" in suggestion.reason


def test_overfit_says_whether_the_loss_decreases() -> None:
    assert "it decreases" in describe_losses([1.0, 0.9, 0.5])
    for losses in ([1.0, 1.0, 0.99], [1.0, 3.0, 9.0], [1.0, float("nan")]):
        assert re.search("does NOT decrease.*optim.lr", describe_losses(losses), flags=re.DOTALL)
