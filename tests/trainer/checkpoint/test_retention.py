import random
from dataclasses import replace
from functools import partial
from typing import Any

import pytest

from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import CheckpointId

POLICY = RetentionPolicy(every_steps=None, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)
policy = partial(replace, POLICY)


@pytest.mark.parametrize(
    ("changes", "seconds", "expected"),
    [
        ({}, 1e9, []),
        ({"every_steps": 3}, 0.0, [3, 6]),
        ({"every_seconds": 10.0}, 10.0, [1, 2, 3, 4, 5, 6]),
        ({"every_steps": 3, "every_seconds": 10.0}, 11.0, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_a_checkpoint_is_due_by_steps_or_seconds(changes: dict[str, Any], seconds: float, expected: list[int]) -> None:
    assert [step for step in range(1, 7) if policy(**changes).should_save(step, seconds)] == expected


CHECKPOINTS = [CheckpointId(step, step // 4) for step in (2, 4, 6, 8, 10)]


@pytest.mark.parametrize(
    ("changes", "best", "kept"),
    [
        ({}, None, {8, 10}),
        ({"keep_last": 1}, None, {10}),
        ({"keep_last": 100}, None, {2, 4, 6, 8, 10}),
        ({"keep_best": True}, CheckpointId(4, 1), {4, 8, 10}),
        ({"keep_best": True}, CheckpointId(5, 1), {8, 10}),  # the best epoch was not saved
        ({"keep_every": 4}, None, {4, 8, 10}),
        ({"keep_every": 5, "keep_best": True, "keep_last": 1}, CheckpointId(2, 0), {2, 10}),
    ],
)
def test_last_best_and_every_are_kept_in_any_order(
    changes: dict[str, Any], best: CheckpointId | None, kept: set[int]
) -> None:
    for seed in range(5):
        checkpoints = random.Random(seed).sample(CHECKPOINTS, len(CHECKPOINTS))
        to_keep = policy(**changes).to_keep(checkpoints, best)
        assert {checkpoint.step for checkpoint in to_keep & set(CHECKPOINTS)} == kept
    assert policy(**changes).to_keep([], None) == set()


def test_of_two_checkpoints_at_a_step_the_evaluated_one_is_kept() -> None:
    before, after, last = CheckpointId(8, 1), CheckpointId(8, 2), CheckpointId(9, 2)
    assert policy(keep_last=1).to_keep([after, before], None) == {after}
    assert policy(keep_last=1, keep_every=8).to_keep([before, after, last], None) == {after, last}
