import math

import pytest
import torch

from trainer.errors import UserError
from trainer.optim.schedule import Duration, Interval, lr_multiplier, parse_duration, parse_interval, to_steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [("7 steps", 7), ("1 step", 1), ("2 epochs", 20), ("0.5 epochs", 5), ("10%", 4), ("0 steps", 0)],
)
def test_a_duration_becomes_steps(text: str, steps: int) -> None:
    assert to_steps(parse_duration("optim.warmup", text), steps_per_epoch=10, total_steps=40) == steps


@pytest.mark.parametrize("text", ["", "7", "seven steps", "-1 steps", "200%", "1e3 steps", "5 minutes"])
def test_what_is_not_a_duration_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"optim\.warmup"):
        parse_duration("optim.warmup", text)


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("3 steps", Interval(training=Duration(3, "step"))),
        ("1 step", Interval(training=Duration(1, "step"))),
        ("1 epoch", Interval(training=Duration(1, "epoch"))),
        ("0.5 epochs", Interval(training=Duration(0.5, "epoch"))),
        ("10%", Interval(training=Duration(10, "%"))),
        (" 2.5 % ", Interval(training=Duration(2.5, "%"))),
        ("3 s", Interval(seconds=3)),
        ("0.5s", Interval(seconds=0.5)),
        ("10 min", Interval(seconds=600)),
        ("1.5 h", Interval(seconds=5400)),
    ],
)
def test_an_interval_is_an_amount_of_training_or_a_time(text: str, interval: Interval) -> None:
    assert parse_interval("checkpoint.every", text) == interval


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "null",
        "ten min",
        "-1 min",
        "1e3 s",
        "5 minutes",
        "2 hours",
        "1 d",
        "1 h 30 min",
        "200%",
        "inf s",
    ],
)
def test_what_is_no_interval_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_interval("checkpoint.every", text)
    assert str(caught.value) == (
        f"checkpoint.every is {text!r}: expected an interval, as in '100 steps', '1 epoch', '10%', '10 min' or '2 h'"
    )


@pytest.mark.parametrize("text", ["0 steps", "0 epochs", "0%", "0 s", "0.0 h"])
def test_an_interval_of_nothing_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep_every is .*: expected more than nothing, or null"):
        parse_interval("checkpoint.keep_every", text)


def test_constant_after_a_linear_warm_up() -> None:
    factors = [lr_multiplier(step, total_steps=6, warmup_steps=4, kind="constant") for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_starts_at_1_falls_and_would_end_at_0() -> None:
    factors = [lr_multiplier(step, total_steps=8, warmup_steps=0, kind="cosine") for step in range(9)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert factors[4] == pytest.approx(0.5)
    assert factors[8] == pytest.approx(0, abs=1e-15)
    assert factors[2] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    factors = [lr_multiplier(step, total_steps=3, warmup_steps=3, kind="cosine") for step in range(3)]
    assert factors == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]


def one_cycle(total: int, warmup: int) -> list[float]:
    return [
        lr_multiplier(step, total_steps=total, warmup_steps=warmup, kind="one-cycle") for step in range(total)
    ]


@pytest.mark.parametrize(("total", "warmup", "peak"), [(20, 0, 5), (20, 3, 2), (7, 7, 6), (1000, 0, 299)])
def test_one_cycle_rises_from_a_25th_to_the_peak_and_falls_to_a_250_000th(
    total: int, warmup: int, peak: int
) -> None:
    factors = one_cycle(total, warmup)
    assert factors[0] == pytest.approx(1 / 25, rel=1e-12)
    assert factors[peak] == max(factors) == 1
    assert factors[: peak + 1] == sorted(factors[: peak + 1])
    assert factors[peak:] == sorted(factors[peak:], reverse=True)
    if peak + 1 < total:
        assert factors[-1] == pytest.approx(1 / 25 / 1e4, rel=1e-9)


def test_one_cycle_follows_torchs_own() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    theirs = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=50, pct_start=0.3, cycle_momentum=False
    )
    rates = []
    for _ in range(50):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step() if len(rates) < 50 else None
    assert one_cycle(50, 0) == pytest.approx(rates, rel=1e-9)


@pytest.mark.parametrize(("total", "expected"), [(1, [1.0]), (2, [1.0, 4e-6]), (3, [1.0, 0.500002, 4e-6])])
def test_one_cycle_in_a_very_short_run_is_at_its_peak_at_once(total: int, expected: list[float]) -> None:
    assert one_cycle(total, 0) == pytest.approx(expected)


@pytest.mark.parametrize(("total", "warmup"), [(1, 0), (7, 7), (9, 0)])
def test_one_cycle_has_a_rate_for_the_update_after_the_last(total: int, warmup: int) -> None:
    after = lr_multiplier(total, total_steps=total, warmup_steps=warmup, kind="one-cycle")
    assert after == pytest.approx(4e-6), "a checkpoint at the end names it, and a longer run goes on"
