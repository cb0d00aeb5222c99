"""A start of a Slurm job has ended: is the job to be queued again, and with which code does it leave? Pure functions.

One owner of each decision: torchrun starts again a process that failed, Slurm a job whose node was lost or that it
preempted. What is left is decided here, by the run folder's attempts, the only counter there is.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from launch.contract import DONE, FAILED, STOP_FILE, STOPPED, USER_ERROR, Attempt

MAX_ATTEMPTS = 100
_OURS = {"RUNNING", "CONFIGURING", "SUSPENDED", "STOPPED", "SIGNALING", "RESIZING"}
_QUEUED = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}


class Standing(Enum):
    """Whose a job is, in Slurm's eyes."""

    OURS = "running"
    """To be queued again by the job itself, if at all; also where it has come to its time limit."""
    QUEUED = "queued again by Slurm"
    ENDED = "cancelled, or ended by Slurm"


def standing(state: str | None, reason: str) -> Standing:
    """Return whose a job is by its state and reason in `squeue`; None: not to be found out, so the job tries.

    While its processes end, a cancelled job and one that Slurm has preempted and queued again both say COMPLETING:
    neither is the job's to queue.
    """
    if state is None or state in _OURS:
        return Standing.OURS
    if state in _QUEUED:
        return Standing.QUEUED
    return Standing.OURS if reason == "TimeLimit" else Standing.ENDED


@dataclass(frozen=True, kw_only=True)
class Start:
    """What is known of a job's start, after its processes have ended."""

    before: tuple[Attempt, ...]
    """The run's attempts as the start found them."""
    after: tuple[Attempt, ...]
    """The run's attempts now."""
    asked: str | None
    """The signal that came to the job, None if there was none."""
    standing: Standing
    users_error: bool
    """Whether the first failure is for the user to mend."""
    ended_well: bool
    """Whether all nodes' processes have left with 0."""
    restarts: int
    """How often Slurm has started the job again (SLURM_RESTART_COUNT)."""
    limit: int
    """Most attempts of the run, over all starts of all its jobs."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What becomes of the job."""

    requeue: bool
    code: int
    """With which the job leaves if it is not queued again."""
    why: str


def decide(start: Start) -> Decision:
    """Return whether to queue the job again, and why.

    A run that is done, that a person has stopped, or that its user has to mend is not; one that was stopped by a
    signal is while attempts remain (a preemption is no failure); after a failure only if the run has come further
    in this start, so that an error which always comes at the same place does not go on for ever.
    """
    wanted, code, why = _judge(start)
    used = max((attempt.attempt for attempt in start.after), default=0)
    if not wanted:
        return Decision(requeue=False, code=code, why=why)
    if start.standing is Standing.QUEUED:
        return Decision(requeue=False, code=code, why=f"{why}; Slurm has queued the job again already")
    if start.standing is Standing.ENDED:
        return Decision(requeue=False, code=code, why=f"{why}; the job was cancelled, or ended by Slurm")
    # A start that came to no attempt is not counted by them.
    if max(used, start.restarts + 1) >= start.limit:
        return Decision(requeue=False, code=code, why=f"{why}; all {start.limit} attempts are made")
    return Decision(requeue=True, code=code, why=f"{why}; {used} of {start.limit} attempts are made")


def _judge(start: Start) -> tuple[bool, int, str]:
    """Return whether another start would be of use, the code to leave with where there is none, and why."""
    made = new_attempts(start.before, start.after)
    last = made[-1] if made else None
    if last is not None and (
        last.state == "done" or is_stop(last, asked=start.asked is not None, ended_well=start.ended_well)
    ):
        return _judge_end(start, last)
    if start.users_error:
        return False, USER_ERROR, "an error for its user to mend, which another start would not"
    if last is None and start.asked is not None:
        return True, STOPPED, f"stopped by {start.asked} before training began"
    if last is None and start.ended_well:
        return False, DONE, "ended, with nothing to train"
    return _judge_failure(start, last)


def is_stop(last: Attempt, *, asked: bool, ended_well: bool) -> bool:
    """Return whether the run was asked to stop, by a signal that came from outside or by the file.

    Where a process fails, Slurm and torchrun send the others TERM: what they take for a wish is its echo.
    """
    return last.state == "stopped" and (asked or ended_well or last.reason == STOP_FILE)


def _judge_end(start: Start, last: Attempt) -> tuple[bool, int, str]:
    if last.state == "done":
        return False, DONE, "done"
    saved = f"saved after step {last.step} of {last.steps}" if last.step else "with nothing to save"
    if last.reason == STOP_FILE:
        return False, STOPPED, f"stopped by {STOP_FILE}, {saved}: a person asked for it"
    return True, STOPPED, f"stopped by {start.asked or last.reason}, {saved}"


def _judge_failure(start: Start, last: Attempt | None) -> tuple[bool, int, str]:
    what = "failed before an attempt began" if last is None else "failed"
    if last is not None and last.state == "running":
        what = f"killed while it stopped for {start.asked}" if start.asked else "killed without a word"
    if last is not None and last.state == "stopped":
        what = "failed, for which the other processes were stopped"
    further = progress(start)
    if further is None:
        return False, FAILED, f"{what}, and nothing new was saved in this start: the next would fail as well"
    return True, FAILED, f"{what}, but step {further} was saved, which is new"


def new_attempts(before: Sequence[Attempt], after: Sequence[Attempt]) -> list[Attempt]:
    """Return the attempts that a start has made, in their order; torchrun's own restarts are attempts too."""
    known = {_identity(attempt) for attempt in before}
    made = [attempt for attempt in after if _identity(attempt) not in known]
    return sorted(made, key=lambda attempt: attempt.attempt)


def progress(start: Start) -> int | None:
    """Return the newest step that is saved and was not before this start, None where there is none.

    Each stage (source model, fine-tuning, scratch) has its own steps. Attempts of a run that was moved aside do
    not count.
    """
    known = {_identity(attempt) for attempt in start.before}
    earlier = _steps(attempt for attempt in start.after if _identity(attempt) in known)
    now = _steps(new_attempts(start.before, start.after))
    further = [step for stage, step in now.items() if step > earlier.get(stage, 0)]
    return further[-1] if further else None


def _steps(attempts: Iterable[Attempt]) -> dict[str, int]:
    """Return the last saved step of each stage."""
    found: dict[str, int] = {}
    for attempt in attempts:
        found[attempt.stage] = max(found.get(attempt.stage, 0), attempt.step)
    return found


def _identity(attempt: Attempt) -> tuple[int, str, str, int]:
    """Return what tells an attempt from one of the same number in a run that was moved aside."""
    return attempt.attempt, attempt.began, attempt.host, attempt.pid
