import math
from typing import Any

import pytest
import torch

from trainer.errors import UserError
from trainer.optim.schedule import (
    Duration,
    Interval,
    TrainSchedule,
    get_lr_multiplier,
    parse_duration,
    parse_interval,
    to_steps,
)


@pytest.mark.parametrize(
    ("text", "steps"), [("7 steps", 7), ("1 step", 1), ("2 epochs", 20), ("0.5 epochs", 5), ("10%", 4), ("0 steps", 0)]
)
def test_a_duration_becomes_steps(text: str, steps: int) -> None:
    assert to_steps(parse_duration("optim.warmup", text), steps_per_epoch=10, total_steps=40) == steps


@pytest.mark.parametrize(
    ("text", "interval"),
    [
        ("3 steps", Interval(training=Duration(3, "step"))),
        (" 2.5 % ", Interval(training=Duration(2.5, "%"))),
        ("0.5s", Interval(seconds=0.5)),
        ("10 min", Interval(seconds=600)),
        ("1.5 h", Interval(seconds=5400)),
    ],
)
def test_an_interval_is_a_duration_or_a_time(text: str, interval: Interval) -> None:
    assert parse_interval("checkpoint.every", text) == interval


@pytest.mark.parametrize("text", ["", "7", "null", "seven steps", "-1 steps", "200%", "5 minutes", "1 h 1 s"])
def test_other_texts_are_neither_durations_nor_intervals(text: str) -> None:
    for parse in (parse_duration, parse_interval):
        with pytest.raises(UserError, match=f"^optim.warmup is {text!r}: expected "):
            parse("optim.warmup", text)


@pytest.mark.parametrize("text", ["0 steps", "0%", "0.0 h"])
def test_an_interval_of_zero_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"checkpoint\.keep_every is .*: expected more than 0, or null"):
        parse_interval("checkpoint.keep_every", text)


def test_metrics_are_logged_at_equal_distances_and_at_the_end_of_an_epoch() -> None:
    for logs, steps, expected in (
        (5, 16, {4, 7, 10, 13, 16}), (5, 3, {1, 2, 3}), (5, 1, {1}), (1, 7, {7}), (100, 4, {1, 2, 3, 4}),
    ):  # fmt: skip
        schedule = TrainSchedule(
            batch_sizes=(1,) * steps, epochs=1, logs_per_epoch=logs, lr_multiplier=lambda step: 1.0
        )
        assert schedule.log_steps == expected


def multipliers(kind: Any, total: int, warmup: int = 0, *, steps: int | None = None) -> list[float]:
    """Return the learning rates of a run over its peak, by default for all of its steps."""
    return [
        get_lr_multiplier(step, total_steps=total, warmup_steps=warmup, kind=kind)
        for step in range(total if steps is None else steps)
    ]


def test_a_linear_warmup_may_be_as_long_as_the_run() -> None:
    assert multipliers("constant", 6, 4) == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert multipliers("cosine", 4, 4) == [0.25, 0.5, 0.75, 1.0]


def test_cosine_falls_from_1_and_would_reach_0_after_the_last_step() -> None:
    factors = multipliers("cosine", 8, steps=9)
    assert factors == sorted(factors, reverse=True)
    expected = {0: 1, 2: 0.5 * (1 + math.cos(math.pi / 4)), 4: 0.5, 8: 0}
    assert {step: factors[step] for step in expected} == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("warmup", "pct_start"), [(0, 0.3), (10, 0.2)])
def test_one_cycle_equals_torchs_own(warmup: int, pct_start: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=1.0, total_steps=50, pct_start=pct_start, cycle_momentum=False
    )
    expected = [optimizer.param_groups[0]["lr"]]
    while len(expected) < 50:
        optimizer.step()
        scheduler.step()
        expected.append(optimizer.param_groups[0]["lr"])
    assert multipliers("one-cycle", 50, warmup) == pytest.approx(expected, rel=1e-9)


def test_one_cycle_starts_a_very_short_run_at_its_peak_and_may_be_extended() -> None:
    for expected in ([1.0], [1.0, 4e-6], [1.0, 0.500002, 4e-6]):
        assert multipliers("one-cycle", len(expected)) == pytest.approx(expected)
    for total, warmup in ((1, 0), (7, 7), (9, 0)):
        factors = multipliers("one-cycle", total, warmup, steps=total + 1)
        assert (max(factors), factors[-1]) == (1, pytest.approx(4e-6))
