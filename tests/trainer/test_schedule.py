import math

import pytest

from trainer.errors import UserError
from trainer.schedule import Duration, Interval, lr_factor, parse_duration, parse_interval, to_steps


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
    factors = [lr_factor(step, total_steps=6, warmup_steps=4, kind="constant") for step in range(6)]
    assert factors == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


def test_the_cosine_starts_at_1_falls_and_would_end_at_0() -> None:
    factors = [lr_factor(step, total_steps=8, warmup_steps=0, kind="cosine") for step in range(9)]
    assert factors[0] == 1
    assert factors == sorted(factors, reverse=True)
    assert factors[4] == pytest.approx(0.5)
    assert factors[8] == pytest.approx(0, abs=1e-15)
    assert factors[2] == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


def test_a_warm_up_as_long_as_the_run_only_rises() -> None:
    factors = [lr_factor(step, total_steps=3, warmup_steps=3, kind="cosine") for step in range(3)]
    assert factors == [pytest.approx(1 / 3), pytest.approx(2 / 3), 1]
