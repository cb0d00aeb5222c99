import random
from typing import Any

import pytest

from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.store import CheckpointId


def policy(**changes: Any) -> RetentionPolicy:
    fields: dict[str, Any] = {
        "every_steps": None,
        "every_seconds": None,
        "keep_last": 2,
        "keep_best": False,
        "keep_every": None,
    }
    return RetentionPolicy(**fields | changes)


def test_without_an_interval_none_is_due() -> None:
    assert not any(policy().should_save(step, 1e9) for step in range(100))


def test_an_interval_in_steps_counts_the_steps_of_the_run() -> None:
    every_3 = policy(every_steps=3)
    assert [step for step in range(1, 13) if every_3.should_save(step, 0.0)] == [3, 6, 9, 12]
    assert all(policy(every_steps=1).should_save(step, 0.0) for step in range(1, 5))


def test_an_interval_in_seconds_counts_from_the_last_checkpoint() -> None:
    every_10_s = policy(every_seconds=10.0)
    assert not every_10_s.should_save(7, 9.99)
    assert every_10_s.should_save(7, 10.0)
    assert every_10_s.should_save(7, 1e9)


def test_of_two_intervals_the_earlier_counts() -> None:
    both = policy(every_steps=3, every_seconds=10.0)
    assert [both.should_save(step, seconds) for step, seconds in [(3, 0.0), (4, 11.0), (4, 9.0)]] == [
        True,
        True,
        False,
    ]


PLACES = [CheckpointId(step, step // 4) for step in (2, 4, 6, 8, 10)]


@pytest.mark.parametrize(
    ("changes", "best", "kept"),
    [
        ({}, None, {8, 10}),
        ({"keep_last": 1}, None, {10}),
        ({"keep_last": 4}, None, {4, 6, 8, 10}),
        ({"keep_last": 100}, None, {2, 4, 6, 8, 10}),
        ({}, CheckpointId(4, 1), {8, 10}),
        ({"keep_best": True}, CheckpointId(4, 1), {4, 8, 10}),
        ({"keep_best": True}, CheckpointId(10, 2), {8, 10}),
        ({"keep_best": True}, None, {8, 10}),
        ({"keep_every": 4}, None, {4, 8, 10}),
        ({"keep_every": 3, "keep_last": 1}, None, {6, 10}),
        ({"keep_every": 5, "keep_best": True, "keep_last": 1}, CheckpointId(2, 0), {2, 10}),
    ],
)
def test_the_last_the_best_and_the_milestones_are_kept(
    changes: dict[str, Any], best: CheckpointId | None, kept: set[int]
) -> None:
    for seed in range(5):
        places = random.Random(seed).sample(PLACES, len(PLACES))
        found = policy(**changes).to_keep(places, best)
        assert {place.step for place in found} == kept, "whatever the order they are given in"
        assert found <= set(PLACES)


def test_a_best_that_was_not_saved_takes_no_other_ones_place() -> None:
    found = policy(keep_best=True).to_keep(PLACES, CheckpointId(5, 1))
    assert found & set(PLACES) == {CheckpointId(8, 2), CheckpointId(10, 2)}


def test_of_two_at_the_same_step_the_later_is_the_milestone() -> None:
    """The last step of an epoch, before and after its evaluation."""
    before, after = CheckpointId(8, 1), CheckpointId(8, 2)
    assert policy(keep_last=1).to_keep([after, before], None) == {after}
    assert policy(keep_last=1, keep_every=8).to_keep([before, after, CheckpointId(9, 2)], None) == {
        after,
        CheckpointId(9, 2),
    }


def test_of_none_none_is_kept() -> None:
    assert policy(keep_every=1).to_keep([], None) == set()
