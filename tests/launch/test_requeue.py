from dataclasses import replace
from itertools import product

import pytest

from launch.slurm.requeue import JobOutcome, JobOwner, decide, job_owner, new_attempts, new_step
from regraft.contract import AttemptRecord
from tests.launching import attempt

BEFORE = (attempt(1, "stopped", reason="SIGUSR1", step=10), attempt(2, "running", step=40))


def outcome(*new: AttemptRecord, before: tuple[AttemptRecord, ...] = BEFORE, **changes: object) -> JobOutcome:
    attempts = {"attempts_before": before, "attempts_after": (*before, *new), "restarts": 0, "max_attempts": 100}
    ended = {"signal": None, "owner": JobOwner.JOB, "user_error": False, "succeeded": False}
    return JobOutcome(**{**attempts, **ended, **changes})  # type: ignore[arg-type]


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
        (outcome(attempt(3, "running", step=41)), True, 1, "killed, but"),
        (outcome(attempt(3, "running", step=40)), False, 1, "killed, and"),
        (outcome(attempt(3, "running", step=41), signal="SIGTERM"), True, 1, "while stopping for SIGTERM"),
        (outcome(), False, 1, "before an attempt started"),
        (outcome(succeeded=True), False, 0, "nothing to train"),
        (outcome(stopped(50), succeeded=True, owner=JobOwner.NOBODY), False, 75, "cancelled"),
        (outcome(stopped(50), succeeded=True, owner=JobOwner.SLURM), False, 75, "already requeued"),
        (outcome(stopped(9), succeeded=True, max_attempts=9), True, 75, "of 100; 3 of 9 attempts are used"),
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


def test_attempts_are_limited() -> None:
    for n in (98, 99, 100, 101):
        assert decide(outcome(attempt(n, "stopped", step=1), succeeded=True)).requeue is (n < 100)
        # Starts that end before their first attempt count as well.
        assert decide(outcome(signal="SIGTERM", restarts=n)).requeue is (n < 99)


def test_steps_of_another_phase_or_of_an_archived_run_do_not_count() -> None:
    before = (attempt(1, "failed", stage="pretrain", step=500),)
    assert new_step(outcome(attempt(2, "failed", step=3), before=before)) == 3
    assert new_step(outcome(attempt(2, "failed", stage="pretrain", step=500), before=before)) is None
    before = (attempt(1, "failed", step=90),)
    new = replace(attempt(1, "failed", step=5), began="2026-01-02T00:00:00", pid=7)
    case = replace(outcome(before=before), attempts_after=(new,))
    assert new_attempts(case.attempts_before, case.attempts_after) == [new]
    assert new_step(case) == 5


@pytest.mark.parametrize(
    ("owner", "states"),
    [
        (JobOwner.JOB, [("RUNNING", "None"), (None, ""), ("COMPLETING", "TimeLimit"), ("TIMEOUT", "TimeLimit")]),
        (JobOwner.SLURM, [("PENDING", "BeginTime"), ("REQUEUED", "None")]),
        (JobOwner.NOBODY, [("COMPLETING", "None"), ("PREEMPTED", "None"), ("a state of a future Slurm", "None")]),
    ],
)
def test_job_owner_by_state(owner: JobOwner, states: list[tuple[str | None, str]]) -> None:
    assert [job_owner(state, reason) for state, reason in states] == [owner] * len(states)
