"""`regraft status`: report the state of a run from its folder, for example on a login node."""

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch.errors import LaunchError
from launch.experiments import differing_options, find_runs, read_options
from launch.slurm import allocation
from launch.stop_signal import read_stop_signal
from launch.text import escape_unprintable
from regraft.contract import (
    ATTEMPTS,
    BASELINE,
    DEFAULT_RUN_DIR,
    JOB_ID,
    LOGS,
    METRICS,
    PRETRAIN,
    AttemptRecord,
    last_heartbeat,
    latest_attempt,
    read_attempts,
    read_file,
)

DEAD_AFTER_SECONDS = 45.0
"""Seconds without a heartbeat (one is due every 10) after which a run counts as dead."""
_POLL_SECONDS = 2.0
_ACTIVE_STATES = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
_MAX_METRICS_BYTES = 1 << 26
"""Of a larger metrics.jsonl, only the last rows are read."""
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
    lines_shown = 0
    while True:
        query = _query_slurm if shutil.which("squeue") else None
        text, code, ended = describe_all(run, now=time.time(), query=query)
        if lines_shown and sys.stdout.isatty():
            say(f"\x1b[{lines_shown}A\x1b[J{text}")
        else:
            say(text)
        if ended or not watch:
            return code
        lines_shown = text.count("\n") + 1
        time.sleep(_POLL_SECONDS)


def describe_all(run: Path | None, *, now: float, query: SlurmQuery | None = None) -> tuple[str, int, bool]:
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
    texts, codes, ends = [], [], []
    for path, options in zip(runs, differing_options(runs), strict=True):
        try:
            text, code, ended = describe(path, now=now, query=query)
        except LaunchError as error:
            text, code, ended = str(error), 0, True
        lines = [*text.split("\n"), *([f"options: {options}"] if options else [])]
        texts.append("\n  ".join(map(escape_unprintable, lines)))
        codes.append(code)
        ends.append(ended)
    return "\n\n".join(texts), max(codes), all(ends)


def describe(run: Path, *, now: float, query: SlurmQuery | None = None) -> tuple[str, int, bool]:
    """Return (a few lines about a run, exit code, whether the run has ended). Nothing in the folder is trusted.

    Args:
        run: the run folder.
        now: current time [seconds since 1970].
        query: asks Slurm about a job; None without Slurm.

    Raises:
        LaunchError: the folder contains no run, or cannot be read.

    """
    try:
        lines, code, ended = _describe(run, now, query)
    except OSError as error:
        raise LaunchError(f"{run}: cannot be read ({error.strerror or error})") from None
    return "\n".join(map(escape_unprintable, lines)), code, ended


def _describe(run: Path, now: float, query: SlurmQuery | None) -> tuple[list[str], int, bool]:
    attempt = latest_attempt(run) if run.is_dir() else None
    if attempt is None:
        return _describe_unstarted(run, query)
    age = now - (last_heartbeat(run, attempt.attempt) or now)
    dead = attempt.state == "running" and age > DEAD_AFTER_SECONDS
    lines = [f"{run}: {_state(run, attempt, age, dead=dead)}"]
    lines += _progress(run, attempt, dead=dead)
    lines += _previous_failure(run, attempt)
    ended = attempt.state != "running" or dead
    if ended and attempt.state != "done" and (run / LOGS).is_dir():
        lines.append(f"logs: {run / LOGS}")
    job = _latest_job(run)
    if job is not None and query is not None:
        line, active = _slurm_line(job, query)
        lines.append(line)
        ended = ended and not active
    return lines, 0 if attempt.state == "done" or not ended else _NOT_DONE, ended


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
    state = f"no heartbeat for {_duration(age)}: probably killed" if dead else attempt.state
    reason = _first_line(attempt.reason)
    if attempt.state == "stopped" and reason == "SIGTERM":
        reason = read_stop_signal(run, attempt.attempt) or reason
    return state + (f" ({reason})" if reason else "")


def _first_line(text: str | None) -> str:
    # The trainer escapes the line breaks of a reason.
    return (text or "").strip().partition("\n")[0].partition("\\n")[0]


def _progress(run: Path, attempt: AttemptRecord, *, dead: bool) -> list[str]:
    # When all is done, show the fine-tuned model, and not the phase that was trained last for comparison.
    phase = attempt.stage if attempt.state != "done" and attempt.stage in (PRETRAIN, BASELINE) else ""
    rows = _read_metrics(run / phase)
    step = max(attempt.step, rows[-1]["step"] if rows else 0)
    lines = [
        f"attempt {attempt.attempt}, process {attempt.pid} on {attempt.host}, started {attempt.began}",
        f"step {step} of {attempt.steps or '?'}, epoch {attempt.epoch} of {attempt.epochs or '?'}"
        + (f" of the {phase} phase" if phase else ""),
    ]
    split = "val" if any("val_accuracy" in row for row in rows) else "test"
    keys = ("epoch", "seconds", "examples_per_sec", "train_loss", f"{split}_accuracy", f"{split}_loss")
    epochs = [row for row in rows if row.get("kind") == "epoch" and all(_is_number(row.get(key)) for key in keys)]
    if epochs:
        last = epochs[-1]
        best = _best_epoch(epochs, split, select_by=read_options(run / phase).get("checkpoint.select_by"))
        lines.append(
            f"{split} accuracy {last[f'{split}_accuracy']:.3f} after epoch {last['epoch']}, best "
            f"{best[f'{split}_accuracy']:.3f} after epoch {best['epoch']}; train loss {last['train_loss']:.4f}"
        )
        remaining = _remaining_seconds(attempt, epochs, step)
        if remaining is not None and attempt.state == "running" and not dead:
            lines.append(f"ETA {_duration(remaining)}, {last['examples_per_sec']:,.1f} examples/s")
    return lines


def _best_epoch(epochs: list[dict[str, Any]], split: str, *, select_by: object) -> dict[str, Any]:
    """Return the best epoch as the run selects it: by checkpoint.select_by, then by loss; the first of equal ones."""
    metric = {"log_loss": "loss"}.get(str(select_by), str(select_by))
    if not all(_is_number(row.get(f"{split}_{metric}")) for row in epochs):  # a run of an earlier version
        metric = "accuracy"
    sign = -1 if metric == "loss" else 1
    return max(epochs, key=lambda row: (sign * row[f"{split}_{metric}"], -row[f"{split}_loss"]))


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


def _read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics that have a step, without a last line that is still being written."""
    try:
        content = read_file(folder / METRICS, max_bytes=_MAX_METRICS_BYTES)
    except OSError:
        return []
    rows = []
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict) and type(row.get("step")) is int:
            rows.append(row)
    return rows


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _remaining_seconds(attempt: AttemptRecord, epochs: list[dict[str, Any]], step: int) -> float | None:
    """Estimate the remaining training time from the last three epochs."""
    recent = epochs[-3:]
    if not attempt.steps or epochs[-1]["epoch"] <= 0 or epochs[-1]["step"] <= 0:
        return None
    steps_per_epoch = epochs[-1]["step"] / epochs[-1]["epoch"]
    seconds_per_step = sum(row["seconds"] for row in recent) / (steps_per_epoch * len(recent))
    return float((attempt.steps - step) * seconds_per_step)


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
