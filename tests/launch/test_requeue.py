from dataclasses import replace
from itertools import product

import pytest

from launch.contract import Attempt
from launch.slurm.requeue import Decision, Standing, Start, decide, new_attempts, progress, standing


def attempt(number: int, state: str, *, step: int = 0, reason: str | None = None, stage: str = "") -> Attempt:
    return Attempt(
        attempt=number,
        state=state,
        reason=reason,
        stage=stage,
        step=step,
        steps=100,
        epoch=0,
        epochs=5,
        began=f"2026-01-01T00:00:{number:02}",
        ended=None,
        host="node1",
        pid=100 + number,
        seen=0.0,
    )


def start(*made: Attempt, before: tuple[Attempt, ...] = (), **changes: object) -> Start:
    usual = Start(
        before=before,
        after=(*before, *made),
        asked=None,
        standing=Standing.OURS,
        users_error=False,
        ended_well=False,
        restarts=0,
        limit=100,
    )
    return replace(usual, **changes)  # type: ignore[arg-type]


STOPPED = start(attempt(3, "stopped", reason="SIGTERM", step=50), ended_well=True)
EARLIER = (attempt(1, "stopped", reason="SIGUSR1", step=10), attempt(2, "running", step=40))


@pytest.mark.parametrize(
    ("case", "requeue", "code", "words"),
    [
        (start(attempt(3, "done", step=100)), False, 0, "done"),
        (start(attempt(3, "done", step=100), asked="SIGTERM"), False, 0, "done"),
        (STOPPED, True, 75, "SIGTERM, saved after step 50 of 100"),
        # Where a process fails on one node, Slurm sends those of the others TERM.
        (
            replace(STOPPED, ended_well=False),
            True,
            1,
            "for which the other processes were stopped, but step 50",
        ),
        (start(attempt(3, "stopped", reason="SIGTERM")), False, 1, "nothing new"),
        (start(attempt(3, "stopped", reason="SIGTERM"), users_error=True), False, 2, "its user"),
        # The trainer knows what came to it; the job, what came from Slurm.
        (start(attempt(3, "stopped", reason="SIGTERM", step=50), asked="SIGUSR1"), True, 75, "SIGUSR1"),
        (start(attempt(3, "stopped", reason="SIGTERM"), ended_well=True), True, 75, "nothing to save"),
        (start(attempt(3, "stopped", reason="the file STOP", step=50)), False, 75, "a person asked"),
        (start(asked="SIGUSR1"), True, 75, "before training began"),
        (start(users_error=True), False, 2, "its user"),
        (start(attempt(3, "failed", step=90), users_error=True), False, 2, "its user"),
        (start(attempt(3, "failed", step=41)), True, 1, "step 41"),
        (start(attempt(3, "failed", step=40)), False, 1, "nothing new"),
        (start(attempt(3, "failed")), False, 1, "nothing new"),
        (start(attempt(3, "running", step=41)), True, 1, "killed without a word"),
        (start(attempt(3, "running", step=40)), False, 1, "killed without a word"),
        (start(attempt(3, "running", step=41), asked="SIGTERM"), True, 1, "while it stopped for SIGTERM"),
        (start(attempt(3, "running", step=40), asked="SIGTERM"), False, 1, "while it stopped for SIGTERM"),
        (start(), False, 1, "before an attempt began"),
        (start(ended_well=True), False, 0, "nothing to train"),
    ],
)
def test_each_end_of_a_start_has_its_decision(case: Start, requeue: bool, code: int, words: str) -> None:
    case = replace(case, before=EARLIER, after=(*EARLIER, *case.after))
    decision = decide(case)
    assert (decision.requeue, decision.code) == (requeue, code)
    assert words in decision.why


def test_torchruns_own_restarts_are_of_the_same_start() -> None:
    # The first of them came further, the second did not: the start did.
    made = (attempt(3, "failed", step=60), attempt(4, "failed", step=60))
    assert decide(start(*made, before=EARLIER)).requeue
    again = (attempt(5, "failed", step=60), attempt(6, "failed", step=60))
    assert not decide(start(*again, before=(*EARLIER, *made))).requeue


STATES = ("done", "stopped", "failed", "running", None)


@pytest.mark.parametrize(
    ("state", "asked", "whose", "users_error", "left", "step"),
    list(product(STATES, (None, "SIGTERM"), Standing, (False, True), (False, True), (40, 41))),
)
@pytest.mark.parametrize("well", [False, True])
def test_no_combination_breaks_a_rule(
    state: str | None,
    asked: str | None,
    whose: Standing,
    users_error: bool,
    left: bool,
    step: int,
    well: bool,
) -> None:
    made = () if state is None else (attempt(3, state, reason="SIGTERM", step=step),)
    case = start(
        *made,
        before=EARLIER,
        asked=asked,
        standing=whose,
        users_error=users_error,
        ended_well=well,
        limit=4 if left else 3,
    )
    decision = decide(case)
    is_stop = state == "stopped" and (asked is not None or well)
    if decision.requeue:
        assert whose is Standing.OURS
        assert state != "done"
        assert left or state is None  # of which no attempt is made
        assert is_stop or not users_error
        assert is_stop or step == 41 or (state is None and asked)
    if is_stop and whose is Standing.OURS and left:
        assert decision.requeue
    if state == "done" or is_stop:
        assert decision.code == (0 if state == "done" else 75)
    if decision.code == 0:
        assert state == "done" or (state is None and well)
    assert decision.why
    assert "\n" not in decision.why


@pytest.mark.parametrize(("used", "expected"), [(98, True), (99, True), (100, False), (101, False)])
def test_attempts_are_counted_by_the_run_folder(used: int, expected: bool) -> None:
    assert (
        decide(start(attempt(used, "stopped", reason="SIGTERM", step=1), ended_well=True)).requeue is expected
    )


@pytest.mark.parametrize(("restarts", "expected"), [(98, True), (99, False)])
def test_starts_that_come_to_no_attempt_do_not_go_on_for_ever(restarts: int, expected: bool) -> None:
    assert decide(start(asked="SIGTERM", restarts=restarts)).requeue is expected


@pytest.mark.parametrize(("whose", "word"), [(Standing.ENDED, "cancelled"), (Standing.QUEUED, "already")])
def test_what_is_not_ours_is_not_queued_again(whose: Standing, word: str) -> None:
    decision = decide(start(attempt(1, "stopped", reason="SIGTERM", step=9), ended_well=True, standing=whose))
    assert not decision.requeue
    assert word in decision.why


def test_each_stage_has_steps_of_its_own() -> None:
    before = (attempt(1, "failed", stage="source", step=500),)
    assert progress(start(attempt(2, "failed", step=3), before=before)) == 3
    assert progress(start(attempt(2, "failed", stage="source", step=500), before=before)) is None


def test_the_attempts_of_a_run_that_was_moved_aside_do_not_count() -> None:
    # --run.resume never: the new run begins at 1 again, with another process and another time.
    before = (attempt(1, "failed", step=90),)
    new = replace(attempt(1, "failed", step=5), began="2026-01-02T00:00:00", pid=7)
    case = replace(start(before=before), after=(new,))
    assert new_attempts(case.before, case.after) == [new]
    assert progress(case) == 5


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("RUNNING", "None", Standing.OURS),
        (None, "", Standing.OURS),
        ("COMPLETING", "None", Standing.ENDED),
        ("CANCELLED", "None", Standing.ENDED),
        ("COMPLETING", "TimeLimit", Standing.OURS),
        ("TIMEOUT", "TimeLimit", Standing.OURS),
        ("PREEMPTED", "None", Standing.ENDED),
        ("NODE_FAIL", "None", Standing.ENDED),
        ("PENDING", "BeginTime", Standing.QUEUED),
        ("REQUEUED", "None", Standing.QUEUED),
        ("a state of tomorrow", "None", Standing.ENDED),
    ],
)
def test_whose_a_job_is(state: str | None, reason: str, expected: Standing) -> None:
    assert standing(state, reason) is expected


def test_a_decision_says_how_many_attempts_are_made() -> None:
    assert decide(
        start(attempt(7, "stopped", reason="SIGTERM", step=9), ended_well=True, limit=9)
    ) == Decision(
        requeue=True, code=75, why="stopped by SIGTERM, saved after step 9 of 100; 7 of 9 attempts are made"
    )
