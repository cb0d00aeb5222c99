"""`regraft status`: report the state of a run from its folder, for example on a login node."""

import re
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from launch.errors import LaunchError
from launch.experiments import differing_options, find_runs
from launch.slurm import allocation
from launch.status_metrics import format_duration, progress_lines, progress_summary
from launch.stop_signal import read_stop_signal
from launch.text import escape_unprintable
from launch.watch import Report, watch_lines, watch_terminal
from regraft.contract import (
    ATTEMPTS,
    DEFAULT_RUN_DIR,
    JOB_ID,
    LOGS,
    AttemptRecord,
    last_heartbeat,
    latest_attempt,
    read_attempts,
    read_file,
)

DEAD_AFTER_SECONDS = 45.0
"""Seconds without a heartbeat (one is due every 10) after which a run counts as dead."""
_ACTIVE_STATES = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
_NOT_DONE = 3
"""Exit code for a run that has ended before it was done."""

SlurmQuery = Callable[[str], tuple[str, str]]
"""Job id -> state and reason in Slurm."""


def show(run: Path | None, *, watch: bool, say: Callable[[str], object] = print) -> int:
    """Print the state of a run, with `watch` until it ends; return 0 while it runs or is done, 3 otherwise.

    Args:
        run: a run folder, or a folder of several runs; None: the default folder.
        watch: whether to repeat it until the run, or the last of several, has ended.
        say: prints text.

    Raises:
        LaunchError: the folder contains no run.

    """
    query = _query_slurm if shutil.which("squeue") else None

    def look() -> Report:
        return describe_all(run, now=time.time(), query=query)

    if watch:
        return watch_terminal(look) if sys.stdout.isatty() else watch_lines(look, say)
    report = look()
    say(report.text)
    return report.code


def describe_all(run: Path | None, *, now: float, query: SlurmQuery | None = None) -> Report:
    """Return what `describe` returns, for a run or for all runs of a folder; the highest exit code of several runs.

    Raises:
        LaunchError: the folder contains no run, or cannot be read.

    """
    folder = Path(DEFAULT_RUN_DIR) if run is None else run
    parent = folder.parent if run is None else folder
    try:
        is_run = (folder / ATTEMPTS).exists()
        runs = find_runs(parent) if parent.is_dir() and (run is None or not is_run) else []
    except OSError as error:
        raise LaunchError(f"{parent}: cannot be read ({error.strerror or error})") from None
    if not runs or (run is None and runs == [folder]):
        return describe(folder, now=now, query=query)
    reports = []
    for path, options in zip(runs, differing_options(runs), strict=True):
        try:
            report = describe(path, now=now, query=query)
        except LaunchError as error:
            report = Report(text=str(error), summaries=(str(error),), code=0, ended=True)
        lines = [*report.text.split("\n"), *([f"options: {options}"] if options else [])]
        reports.append(replace(report, text="\n  ".join(map(escape_unprintable, lines))))
    return Report(
        text="\n\n".join(report.text for report in reports),
        summaries=tuple(summary for report in reports for summary in report.summaries),
        code=max(report.code for report in reports),
        ended=all(report.ended for report in reports),
    )


def describe(run: Path, *, now: float, query: SlurmQuery | None = None) -> Report:
    """Return the state of a run. Nothing in the folder is trusted.

    Args:
        run: the run folder.
        now: current time [seconds since 1970].
        query: asks Slurm about a job; None without Slurm.

    Raises:
        LaunchError: the folder contains no run, or cannot be read.

    """
    try:
        lines, summary, code, ended = _describe(run, now, query)
    except OSError as error:
        raise LaunchError(f"{run}: cannot be read ({error.strerror or error})") from None
    text = "\n".join(map(escape_unprintable, lines))
    return Report(text=text, summaries=(escape_unprintable(summary),), code=code, ended=ended)


def _describe(run: Path, now: float, query: SlurmQuery | None) -> tuple[list[str], str, int, bool]:
    attempt = latest_attempt(run) if run.is_dir() else None
    if attempt is None:
        lines, code, ended = _describe_unstarted(run, query)
        return lines, "; ".join(lines), code, ended
    age = now - (last_heartbeat(run, attempt.attempt) or now)
    dead = attempt.state == "running" and age > DEAD_AFTER_SECONDS
    lines = [f"{run}: {_state(run, attempt, age, dead=dead)}"]
    lines += progress_lines(run, attempt, dead=dead)
    lines += _previous_failure(run, attempt)
    ended = attempt.state != "running" or dead
    if ended and attempt.state != "done" and (run / LOGS).is_dir():
        lines.append(f"logs: {run / LOGS}")
    job = _latest_job(run)
    if job is not None and query is not None:
        line, active = _slurm_line(job, query)
        lines.append(line)
        ended = ended and not active
    # Without the age of the heartbeat, which changes all the time.
    state = "no heartbeat: probably killed" if dead else _state(run, attempt, age, dead=dead)
    summary = f"{run}: {state}, {progress_summary(run, attempt, dead=dead)}"
    return lines, summary, 0 if attempt.state == "done" or not ended else _NOT_DONE, ended


def _describe_unstarted(run: Path, query: SlurmQuery | None) -> tuple[list[str], int, bool]:
    job = _submitted_job(run)
    if job is not None:
        lines, ended = [f"{run}: submitted, training has not started"], False
        if query is not None:
            line, active = _slurm_line(job, query)
            lines, ended = [*lines, line], not active
        return lines, _NOT_DONE if ended else 0, ended
    if run.exists() and not run.is_dir():
        raise LaunchError(f"{run}: not a folder; expected a run folder (run.dir)")
    if not run.is_dir():
        raise LaunchError(f"{run}: there is no such folder; expected a run folder (run.dir)")
    raise LaunchError(
        f"{run}: no attempt has started here (no readable {ATTEMPTS}/NNNN.json); expected a run folder, "
        "or wait until the data is checked"
    )


def _state(run: Path, attempt: AttemptRecord, age: float, *, dead: bool) -> str:
    state = f"no heartbeat for {format_duration(age)}: probably killed" if dead else attempt.state
    reason = _first_line(attempt.reason)
    if attempt.state == "stopped" and reason == "SIGTERM":
        reason = read_stop_signal(run, attempt.attempt) or reason
    return state + (f" ({reason})" if reason else "")


def _first_line(text: str | None) -> str:
    # The trainer escapes the line breaks of a reason.
    return (text or "").strip().partition("\n")[0].partition("\\n")[0]


def _submitted_job(run: Path) -> str | None:
    """Return the submitted job of a run that has not started; tasks of an array have subfolders of its run folder."""
    for path, task in ((run / JOB_ID, ""), (run.parent / JOB_ID, f"_{run.name}")):
        try:
            job = read_file(path, max_bytes=100).decode("ascii").strip()
        except (OSError, ValueError):
            continue
        if re.fullmatch(r"[0-9]{1,18}", job) and (not task or run.name.isdecimal()):
            return job + task
    return None


def _slurm_line(job: str, query: SlurmQuery) -> tuple[str, bool]:
    """Return (the state of a job in Slurm, whether it is still active)."""
    state, reason = query(job)
    detail = f" ({reason})" if reason not in ("", "None") else ""
    return f"Slurm: job {job} is {state}{detail}", state in _ACTIVE_STATES


def _previous_failure(run: Path, latest: AttemptRecord) -> list[str]:
    """Return a line about the attempt before the latest if that one failed."""
    earlier = [attempt for attempt in read_attempts(run) if attempt.attempt < latest.attempt]
    if not earlier or earlier[-1].state in ("done", "stopped"):
        return []
    reason = _first_line(earlier[-1].reason) or "probably killed"
    return [f"attempt {earlier[-1].attempt} failed after step {earlier[-1].step}: {reason}"]


def _latest_job(run: Path) -> str | None:
    """Return the Slurm job that last started the run, from the name of its log folder (launch/slurm/job.py)."""
    names = sorted(path.name for path in (run / LOGS).glob("*-job-*"))
    match = re.search(r"-job-([0-9_]+)\.[0-9]+$", names[-1]) if names else None
    return match[1] if match else None


def _query_slurm(job: str) -> tuple[str, str]:
    try:
        return allocation.job_state(job)
    except LaunchError:  # by default, Slurm forgets a job some minutes after its end
        return "no longer known", ""
