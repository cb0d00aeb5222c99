"""What a run is doing, from its folder alone: on a login node, with no process of it in sight."""

import json
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from launch import contract
from launch.contract import Attempt
from launch.errors import LaunchError
from launch.slurm import allocation

SILENT = 45.0
"""Seconds without a sign of life (one is given every 10) after which a run is taken for dead."""
_SECONDS_BETWEEN_LOOKS = 2.0
_GOING_ON = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "SUSPENDED", "REQUEUED")
_ENDED = 3
"""The exit code for a run that is not going on and not done."""


def show(run: Path, *, watch: bool, say: Callable[[str], object] = print) -> int:
    """Show a run; with `watch` until it ends. Returns 0 while it runs or when it is done, 3 for what ended otherwise.

    Raises:
        LaunchError: there is no run in that folder.

    """
    shown = 0
    while True:
        text, code, over = describe(run, now=time.time(), ask=_slurm if shutil.which("squeue") else None)
        if shown and sys.stdout.isatty():
            say(f"\x1b[{shown}A\x1b[J{text}")
        else:
            say(text)
        if over or not watch:
            return code
        shown = text.count("\n") + 1
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def describe(
    run: Path, *, now: float, ask: Callable[[str], tuple[str, str]] | None = None
) -> tuple[str, int, bool]:
    """Return (a few lines on a run, the exit code that stands for it, whether it has ended).

    Args:
        run: its folder.
        now: seconds since 1970.
        ask: job -> its state and reason in Slurm; None where there is no Slurm.

    Raises:
        LaunchError: there is no run in that folder.

    """
    attempt = contract.latest_attempt(run) if run.is_dir() else None
    waiting = _submitted(run) if attempt is None else None
    if waiting is not None:
        lines, over = [f"{run}: submitted, and nothing has begun yet"], False
        if ask is not None:
            line, goes_on = _slurms(waiting, ask)
            lines, over = [*lines, line], not goes_on
        return "\n".join(lines), _ENDED if over else 0, over
    if not run.is_dir():
        raise LaunchError(f"{run}: there is no such folder; expected a run's (its run.dir)")
    if attempt is None:
        raise LaunchError(
            f"{run}: no attempt has begun here (there is no readable {contract.ATTEMPTS}/NNNN.json); expected a run "
            "folder, or wait until the data is checked"
        )
    silent = now - attempt.seen
    dead = attempt.state == "running" and silent > SILENT
    state = f"silent for {_span(silent)}: killed, most likely" if dead else attempt.state
    if attempt.reason:
        state += f" ({attempt.reason.splitlines()[0]})"
    # Once all is done, the fine-tuned model is what counts, not the comparison that came after it.
    stage = "" if attempt.state == "done" else attempt.stage
    rows = _rows(run / stage)
    last = rows[-1] if rows else {}
    step = max(attempt.step, int(last.get("step", 0)))
    lines = [
        f"{run}: {state}",
        f"attempt {attempt.attempt}, process {attempt.pid} on {attempt.host}, since {attempt.began}",
        f"step {step} of {attempt.steps or '?'}, epoch {attempt.epoch} of {attempt.epochs or '?'}"
        + (f" of the {stage} stage" if stage else ""),
    ]
    epochs = [row for row in rows if row.get("kind") == "epoch"]
    if epochs:
        newest = epochs[-1]
        part = "val" if "val_accuracy" in newest else "test"
        best = max(epochs, key=lambda row: row[f"{part}_accuracy"])
        lines.append(
            f"{part} accuracy {newest[f'{part}_accuracy']:.3f} after epoch {newest['epoch']}, best "
            f"{best[f'{part}_accuracy']:.3f} after epoch {best['epoch']}; train loss {newest['train_loss']:.4f}"
        )
        left = _left(attempt, epochs, step)
        if left is not None and attempt.state == "running" and not dead:
            lines.append(f"ETA {_span(left)}, at {newest['examples_per_sec']:,.1f} examples a second")
    lines += _last_failure(run, attempt)
    if (attempt.state in ("failed", "stopped") or dead) and (run / contract.LOGS).is_dir():
        lines.append(f"logs: {run / contract.LOGS}")
    over = attempt.state != "running" or dead
    job = _job(run)
    if job is not None and ask is not None:
        line, goes_on = _slurms(job, ask)
        lines.append(line)
        over = over and not goes_on
    return "\n".join(lines), 0 if attempt.state == "done" or not over else _ENDED, over


def _submitted(run: Path) -> str | None:
    """Return the job that was submitted for a run in which nothing has begun; an array's task lies in its folder."""
    for path, task in ((run / contract.JOB, ""), (run.parent / contract.JOB, f"_{run.name}")):
        try:
            job = path.read_text(encoding="ascii").strip()
        except (OSError, ValueError):
            continue
        if re.fullmatch(r"[0-9]+", job) and (not task or run.name.isdecimal()):
            return job + task
    return None


def _slurms(job: str, ask: Callable[[str], tuple[str, str]]) -> tuple[str, bool]:
    """Return (Slurm's word on a job, whether it goes on)."""
    state, reason = ask(job)
    return (
        f"Slurm: job {job} is {state}" + (f" ({reason})" if reason not in ("", "None") else ""),
        state in _GOING_ON,
    )


def _last_failure(run: Path, latest: Attempt) -> list[str]:
    """Return a line on how the attempt before the latest failed, if that is what it did."""
    earlier = [attempt for attempt in contract.all_attempts(run) if attempt.attempt < latest.attempt]
    if not earlier or earlier[-1].state in ("done", "stopped"):
        return []
    reason = (earlier[-1].reason or "killed, most likely").splitlines()[0]
    return [f"attempt {earlier[-1].attempt} failed after step {earlier[-1].step}: {reason}"]


def _job(run: Path) -> str | None:
    """Return the Slurm job that has started the run last, which its logs are named by (launch/slurm/job.py)."""
    names = sorted(path.name for path in (run / contract.LOGS).glob("*-job-*"))
    found = re.search(r"-job-([0-9_]+)\.[0-9]+$", names[-1]) if names else None
    return found[1] if found else None


def _slurm(job: str) -> tuple[str, str]:
    try:
        return allocation.state_of(job)
    except LaunchError:  # it forgets a job some minutes after its end, by default
        return "no longer known there", ""


def _rows(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of a run's metrics; a line that is being written is passed over."""
    try:
        lines = (folder / contract.METRICS).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    rows = []
    for line in lines:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows


def _left(attempt: Attempt, epochs: list[dict[str, Any]], step: int) -> float | None:
    """Return the seconds of training that are left, at the pace of the last epochs."""
    some = epochs[-3:]
    steps = epochs[-1]["step"] / epochs[-1]["epoch"]
    if not attempt.steps or not steps:
        return None
    return float((attempt.steps - step) * sum(row["seconds"] for row in some) / (steps * len(some)))


def _span(seconds: float) -> str:
    minutes, rest = divmod(round(max(0.0, seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
