import re
from dataclasses import replace
from itertools import product

import pytest

from launch.slurm.requeue import JobOutcome, JobOwner, RequeueDecision, decide, job_owner, new_attempts, new_step
from regraft.contract import AttemptRecord
from tests.launch.helpers import attempt

BEFORE = (attempt(1, "stopped", reason="SIGUSR1", step=10), attempt(2, "running", step=40))


def outcome(*new: AttemptRecord, before: tuple[AttemptRecord, ...] = BEFORE, **changes: object) -> JobOutcome:
    default = JobOutcome(
        attempts_before=before,
        attempts_after=(*before, *new),
        signal=None,
        owner=JobOwner.JOB,
        user_error=False,
        succeeded=False,
        restarts=0,
        max_attempts=100,
    )
    return replace(default, **changes)  # type: ignore[arg-type]


def stopped(step: int = 0, reason: str = "SIGTERM") -> AttemptRecord:
    return attempt(3, "stopped", reason=reason, step=step)


@pytest.mark.parametrize(
    ("case", "requeue", "code", "reason"),
    [
        (outcome(attempt(3, "done", step=100)), False, 0, "done"),
        (outcome(attempt(3, "done", step=100), signal="SIGTERM"), False, 0, "done"),
        (outcome(stopped(50), succeeded=True), True, 75, "SIGTERM, saved after step 50 of 100"),
        # When a process fails on one node, Slurm sends SIGTERM to those of the others.
        (outcome(stopped(50)), True, 1, "other processes were stopped, but this start saved a new step (50)"),
        (outcome(stopped()), False, 1, "no new step"),
        (outcome(stopped(), user_error=True), False, 2, "the user must fix"),
        # The trainer receives SIGTERM in any case; the job knows the signal that Slurm sent.
        (outcome(stopped(50), signal="SIGUSR1"), True, 75, "SIGUSR1"),
        (outcome(stopped(), succeeded=True), True, 75, "nothing to save"),
        (outcome(stopped(50, "the file STOP")), False, 75, "a person requested it"),
        (outcome(signal="SIGUSR1"), True, 75, "before training started"),
        (outcome(user_error=True), False, 2, "the user must fix"),
        (outcome(attempt(3, "failed", step=90), user_error=True), False, 2, "the user must fix"),
        (outcome(attempt(3, "failed", step=41)), True, 1, "new step (41)"),
        (outcome(attempt(3, "failed", step=40)), False, 1, "no new step"),
        (outcome(attempt(3, "failed")), False, 1, "no new step"),
        (outcome(attempt(3, "running", step=41)), True, 1, "killed, but"),
        (outcome(attempt(3, "running", step=40)), False, 1, "killed, and"),
        (outcome(attempt(3, "running", step=41), signal="SIGTERM"), True, 1, "while stopping for SIGTERM"),
        (outcome(attempt(3, "running", step=40), signal="SIGTERM"), False, 1, "while stopping for SIGTERM"),
        (outcome(), False, 1, "before an attempt started"),
        (outcome(succeeded=True), False, 0, "nothing to train"),
        (outcome(stopped(50), succeeded=True, owner=JobOwner.NOBODY), False, 75, "cancelled"),
        (outcome(stopped(50), succeeded=True, owner=JobOwner.SLURM), False, 75, "already requeued"),
    ],
)
def test_decision_for_each_outcome(case: JobOutcome, requeue: bool, code: int, reason: str) -> None:
    decision = decide(case)
    assert (decision.requeue, decision.code) == (requeue, code)
    assert reason in decision.reason


def test_torchruns_restarts_belong_to_the_same_start() -> None:
    # Of two attempts, only the first saved a new step: that is enough.
    new = (attempt(3, "failed", step=60), attempt(4, "failed", step=60))
    assert decide(outcome(*new)).requeue
    again = (attempt(5, "failed", step=60), attempt(6, "failed", step=60))
    assert not decide(outcome(*again, before=(*BEFORE, *new))).requeue


@pytest.mark.parametrize("state", ["done", "stopped", "failed", "running", None])
def test_no_combination_breaks_a_rule(state: str | None) -> None:
    no_yes = (False, True)
    for case in product((None, "SIGTERM"), JobOwner, no_yes, no_yes, (40, 41), no_yes):
        signal, owner, user_error, attempts_left, step, succeeded = case
        new = () if state is None else (attempt(3, state, reason="SIGTERM", step=step),)
        facts = {"signal": signal, "owner": owner, "user_error": user_error, "succeeded": succeeded}
        decision = decide(outcome(*new, **facts, max_attempts=4 if attempts_left else 3))
        is_stop = state == "stopped" and (signal is not None or succeeded)
        if decision.requeue:
            assert owner is JobOwner.JOB, case
            assert state != "done", case
            assert attempts_left or state is None, case  # such a start made no attempt
            assert is_stop or not user_error, case
            assert is_stop or step == 41 or (state is None and signal), case
        if is_stop and owner is JobOwner.JOB and attempts_left:
            assert decision.requeue, case
        if state == "done" or is_stop:
            assert decision.code == (0 if state == "done" else 75), case
        if decision.code == 0:
            assert state == "done" or (state is None and succeeded), case
        assert re.fullmatch(".+", decision.reason), case


@pytest.mark.parametrize(
    ("case", "requeue"),
    [
        *((outcome(attempt(n, "stopped", step=1), succeeded=True), n < 100) for n in (98, 99, 100, 101)),
        # Starts that end before their first attempt count as well.
        *((outcome(signal="SIGTERM", restarts=n), n < 99) for n in (98, 99)),
    ],
)
def test_attempts_are_limited(case: JobOutcome, requeue: bool) -> None:
    assert decide(case).requeue is requeue


def test_reason_has_the_number_of_attempts() -> None:
    case = outcome(attempt(7, "stopped", reason="SIGTERM", step=9), before=(), succeeded=True, max_attempts=9)
    reason = "stopped by SIGTERM, saved after step 9 of 100; 7 of 9 attempts are used"
    assert decide(case) == RequeueDecision(requeue=True, code=75, reason=reason)


def test_each_phase_counts_its_own_steps() -> None:
    before = (attempt(1, "failed", stage="pretrain", step=500),)
    assert new_step(outcome(attempt(2, "failed", step=3), before=before)) == 3
    assert new_step(outcome(attempt(2, "failed", stage="pretrain", step=500), before=before)) is None


def test_attempts_of_an_archived_run_do_not_count() -> None:
    # --run.resume never: the new run counts from 1 again, with another process and another time.
    before = (attempt(1, "failed", step=90),)
    new = replace(attempt(1, "failed", step=5), began="2026-01-02T00:00:00", pid=7)
    case = replace(outcome(before=before), attempts_after=(new,))
    assert new_attempts(case.attempts_before, case.attempts_after) == [new]
    assert new_step(case) == 5


@pytest.mark.parametrize(
    ("state", "reason", "expected"),
    [
        ("RUNNING", "None", JobOwner.JOB),
        (None, "", JobOwner.JOB),
        ("COMPLETING", "None", JobOwner.NOBODY),
        ("CANCELLED", "None", JobOwner.NOBODY),
        ("COMPLETING", "TimeLimit", JobOwner.JOB),
        ("TIMEOUT", "TimeLimit", JobOwner.JOB),
        ("PREEMPTED", "None", JobOwner.NOBODY),
        ("NODE_FAIL", "None", JobOwner.NOBODY),
        ("PENDING", "BeginTime", JobOwner.SLURM),
        ("REQUEUED", "None", JobOwner.SLURM),
        ("a state of a future Slurm", "None", JobOwner.NOBODY),
    ],
)
def test_job_owner_by_state(state: str | None, reason: str, expected: JobOwner) -> None:
    assert job_owner(state, reason) is expected
