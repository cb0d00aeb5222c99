"""Decide whether a Slurm job is requeued after its processes have ended; pure functions.

torchrun restarts processes that failed. Slurm requeues jobs that it preempted or whose node was lost. This module
decides the other cases, from the attempts recorded in the run folder, which is the only counter.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from launch.failures import was_requested_stop
from regraft.contract import DONE, FAILED, STOP_FILE, STOPPED, USER_ERROR, AttemptRecord

MAX_ATTEMPTS = 100
_RUNNING = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
_REQUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


class JobOwner(Enum):
    """Who decides whether a job is requeued."""

    JOB = "the job itself"
    """The job is running, or has reached its time limit."""
    SLURM = "Slurm, which has requeued it"
    NOBODY = "nobody: the job was cancelled, or ended by Slurm"


def job_owner(state: str | None, reason: str) -> JobOwner:
    """Return who decides about a job, from its state and reason in `squeue`; if unknown (None), the job itself.

    While their processes end, a cancelled job and a preempted job that Slurm has requeued are both COMPLETING. The job
    must requeue neither.
    """
    if state is None or state in _RUNNING:
        return JobOwner.JOB
    if state in _REQUEUED:
        return JobOwner.SLURM
    return JobOwner.JOB if reason == "TimeLimit" else JobOwner.NOBODY


@dataclass(frozen=True, kw_only=True)
class JobOutcome:
    """What is known about one start of a job after its processes have ended."""

    attempts_before: tuple[AttemptRecord, ...]
    """Attempts of the run before this start."""
    attempts_after: tuple[AttemptRecord, ...]
    """Attempts of the run now."""
    signal: str | None
    """Name of the signal that the job received, None if there was none."""
    owner: JobOwner
    """Who decides whether the job is requeued."""
    user_error: bool
    """Whether the first failure is an error that the user must fix."""
    succeeded: bool
    """Whether the processes of all nodes exited with code 0."""
    restarts: int
    """How often Slurm has restarted the job (SLURM_RESTART_COUNT)."""
    max_attempts: int
    """Limit of attempts of the run, over all starts of all its jobs."""


@dataclass(frozen=True, kw_only=True)
class RequeueDecision:
    """What happens to the job."""

    requeue: bool
    """Whether the job requeues itself."""
    code: int
    """Exit code of the job."""
    reason: str
    """Reason for the decision, printed at the end of the job's output."""


def decide(outcome: JobOutcome) -> RequeueDecision:
    """Decide whether to requeue the job.

    A run that is done, that a person stopped, or that has an error for the user to fix is not requeued. A run that a
    signal stopped is requeued while attempts remain, since a preemption is no failure. A run that failed is requeued
    only if this start has saved a new step: an error that occurs at the same step each time must not repeat forever.
    """
    useful, code, reason = _assess(outcome)
    attempts = max((attempt.attempt for attempt in outcome.attempts_after), default=0)
    if not useful:
        return RequeueDecision(requeue=False, code=code, reason=reason)
    if outcome.owner is JobOwner.SLURM:
        return RequeueDecision(requeue=False, code=code, reason=f"{reason}; Slurm has already requeued the job")
    if outcome.owner is JobOwner.NOBODY:
        return RequeueDecision(requeue=False, code=code, reason=f"{reason}; the job was cancelled, or ended by Slurm")
    # A start that ended before its first attempt counts as well.
    if max(attempts, outcome.restarts + 1) >= outcome.max_attempts:
        return RequeueDecision(
            requeue=False, code=code, reason=f"{reason}; all {outcome.max_attempts} attempts are used"
        )
    return RequeueDecision(
        requeue=True, code=code, reason=f"{reason}; {attempts} of {outcome.max_attempts} attempts are used"
    )


def _assess(outcome: JobOutcome) -> tuple[bool, int, str]:
    """Return (whether another start would be useful, the exit code otherwise, the reason)."""
    new = new_attempts(outcome.attempts_before, outcome.attempts_after)
    last = new[-1] if new else None
    if last is not None and last.state == "done":
        return False, DONE, "done"
    if last is not None and was_requested_stop(last, signaled=outcome.signal is not None, succeeded=outcome.succeeded):
        saved = f"saved after step {last.step} of {last.steps}" if last.step else "with nothing to save"
        if last.reason == STOP_FILE:
            return False, STOPPED, f"stopped by {STOP_FILE}, {saved}: a person requested it"
        return True, STOPPED, f"stopped by {outcome.signal or last.reason}, {saved}"
    if outcome.user_error:
        return False, USER_ERROR, "an error that the user must fix: another start would fail as well"
    return _assess_unstarted(outcome) if last is None else _assess_failure(outcome, last.state)


def _assess_unstarted(outcome: JobOutcome) -> tuple[bool, int, str]:
    if outcome.signal is not None:
        return True, STOPPED, f"stopped by {outcome.signal} before training started"
    if outcome.succeeded:
        return False, DONE, "ended, with nothing to train"
    return _assess_failure(outcome, None)


def _assess_failure(outcome: JobOutcome, last_state: str | None) -> tuple[bool, int, str]:
    what = "failed before an attempt started" if last_state is None else "failed"
    if last_state == "running":
        what = f"killed while stopping for {outcome.signal}" if outcome.signal else "killed"
    elif last_state == "stopped":
        what = "failed, so that the other processes were stopped"
    step = new_step(outcome)
    if step is None:
        return False, FAILED, f"{what}, and this start saved no new step: another start would fail as well"
    return True, FAILED, f"{what}, but this start saved a new step ({step})"


def new_attempts(before: Sequence[AttemptRecord], after: Sequence[AttemptRecord]) -> list[AttemptRecord]:
    """Return the attempts of this start, oldest first; each restart by torchrun is an attempt too."""
    known = {_identity(attempt) for attempt in before}
    new = [attempt for attempt in after if _identity(attempt) not in known]
    return sorted(new, key=lambda attempt: attempt.attempt)


def new_step(outcome: JobOutcome) -> int | None:
    """Return the last step that this start saved beyond those of earlier starts, None if there is none.

    The phases of a run (pretraining, fine-tuning, baseline) count their steps separately. Attempts of an archived run
    do not count.
    """
    known = {_identity(attempt) for attempt in outcome.attempts_before}
    earlier = _last_steps(attempt for attempt in outcome.attempts_after if _identity(attempt) in known)
    now = _last_steps(new_attempts(outcome.attempts_before, outcome.attempts_after))
    new = [step for phase, step in now.items() if step > earlier.get(phase, 0)]
    return new[-1] if new else None


def _last_steps(attempts: Iterable[AttemptRecord]) -> dict[str, int]:
    """Return the last saved step of each phase."""
    steps: dict[str, int] = {}
    for attempt in attempts:
        steps[attempt.stage] = max(steps.get(attempt.stage, 0), attempt.step)
    return steps


def _identity(attempt: AttemptRecord) -> tuple[int, str, str, int]:
    """Return what distinguishes an attempt from one with the same number in an archived run."""
    return attempt.attempt, attempt.began, attempt.host, attempt.pid
