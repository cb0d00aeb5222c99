import math

import numpy as np
import pytest

from trainer.commands.lr_range import SMOOTHING, has_diverged, rates, smoothed, suggest


def test_rates_are_in_geometric_sequence_from_end_to_end() -> None:
    found = rates(1e-6, 10, 8)
    assert found == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1, 10])


def test_the_average_is_not_drawn_towards_0_at_its_start() -> None:
    assert smoothed([3.0, 3.0, 3.0]) == pytest.approx([3, 3, 3])
    first, second = smoothed([1.0, 2.0])
    assert first == pytest.approx(1)
    assert second == pytest.approx((SMOOTHING * 1 + 2) / (SMOOTHING + 1))


def test_it_ends_far_above_the_best_or_where_nothing_is_finite() -> None:
    assert not has_diverged([1.0, 2.0, 3.9])
    falling = [4.0, 3.0, 2.0, 1.0, 0.5, 0.5, 0.5, 0.5]
    assert not has_diverged([*falling, 3.0]), "one batch, smoothed"
    assert has_diverged([*falling, 30.0])
    assert has_diverged([1.0, math.nan])
    assert has_diverged([math.inf])


def curve(tried: list[float], *, knee: float, end: float) -> list[float]:
    """Return losses that fall from 2 to 0.2 around the rate `knee`, and explode from `end` on."""
    return [0.2 + 1.8 / (1 + (rate / knee) ** 2) + (10 * rate / end if rate > end else 0.0) for rate in tried]


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_the_larger_of_the_two_readings_is_suggested_below_a_third_of_the_minimums(scale: float) -> None:
    tried = rates(1e-6 * scale, 1 * scale, 121)
    early = suggest(tried, curve(tried, knee=1e-3 * scale, end=0.5 * scale))
    assert early.steepest is not None
    assert early.tenth is not None
    assert 1e-3 * scale < early.steepest < 4e-3 * scale, "at the knee, and the lag of the smoothing"
    assert early.lr == early.tenth > early.steepest
    assert "tenth" in early.why
    late = suggest(tried, curve(tried, knee=1e-2 * scale, end=3e-2 * scale))
    assert late.tenth is not None
    assert late.lr == late.steepest is not None
    assert late.tenth < late.lr <= late.tenth * 10 / 3 * (1 + 1e-12)
    assert "falls fastest" in late.why


def test_what_comes_after_an_explosion_does_not_count() -> None:
    tried = rates(1e-6, 1, 61)
    losses = curve(tried, knee=1e-4, end=10)
    exploded = [
        loss if rate < 1e-2 else (8.0 if rate < 3e-2 else 0.0)
        for rate, loss in zip(tried, losses, strict=True)
    ]
    found = suggest(tried, exploded)
    assert found.tenth is not None
    assert found.tenth < 1e-3, "the minimum before it, though a lower loss comes later"


@pytest.mark.parametrize("losses", [[2.0] * 20, list(np.linspace(2, 7, 20)), [2.0, 1.95] * 10, [], [2.0]])
def test_where_the_loss_falls_nowhere_nothing_is_suggested(losses: list[float]) -> None:
    found = suggest(rates(1e-5, 1, 20)[: len(losses)], losses)
    assert (found.lr, found.steepest, found.tenth) == (None, None, None)
    assert "--from" in found.why
