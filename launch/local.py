"""A run on this machine: start torchrun, stop it where starting again is of no use, say how it ended."""

import os
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

from launch import contract
from launch.agent import run_agent
from launch.command import Local, environment, torchrun
from launch.errors import LaunchError
from launch.failures import Failure, first_failure, rounds, told


def run(local: Local, run_folder: Path) -> int:
    """Run to the end, and return the exit code: 0 done, 75 stopped and saved, 2 the user's to mend, 1 failed.

    Raises:
        LaunchError: the run folder cannot be written to.

    """
    before = contract.last_number(run_folder)
    fresh = not run_folder.exists()
    watch = _Rounds(local.logs)
    try:
        ended = run_agent(torchrun(local), environment(local, os.environ), local.logs, look=watch.look)
    except OSError as error:
        raise LaunchError(
            f"run.dir {run_folder}: cannot be written to ({error}); choose another folder"
        ) from None
    attempt = contract.latest_attempt(run_folder)
    if attempt is not None and attempt.attempt > before and attempt.state == "done":
        return contract.DONE
    if attempt is not None and attempt.attempt > before and attempt.state == "stopped":
        done = (
            f"saved after step {attempt.step} of {attempt.steps}"
            if attempt.step
            else "there was nothing new to save"
        )
        print(f"stopped by {attempt.reason}: {done}. The same command goes on from there", file=sys.stderr)
        return contract.STOPPED
    if ended.code == 0:  # a finished run that was asked for again, or one moved aside
        return contract.DONE
    failure = first_failure(local.logs, host=socket.gethostname())
    if ended.asked is not None and (attempt is None or attempt.attempt == before):
        print("stopped before training began: there was nothing to save", file=sys.stderr)
        _remove(local.logs, run_folder if fresh else None)
        return contract.STOPPED
    print(told(failure), file=sys.stderr)
    if not failure.is_users:
        return contract.FAILED
    if attempt is None or attempt.attempt == before:  # nothing has begun that a log could tell of
        _remove(local.logs, run_folder if fresh else None)
    return contract.USER_ERROR


class _Rounds:
    """What torchrun's rounds of processes come to: a failure that the user has to mend ends them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._told = 0

    def look(self) -> bool:
        """Tell of each round that failed, once the next has begun; return whether to go on."""
        found = rounds(self._logs)
        for folder in found[self._told : -1]:
            self._told += 1
            print(
                f"{told(first_failure(self._logs, host=socket.gethostname(), of=folder))}\nstarted again",
                file=sys.stderr,
            )
        return not (found and _is_users(found[-1], self._logs))


def _is_users(folder: Path, logs: Path) -> bool:
    if not any(folder.glob("*/error.json")):
        return False
    failure: Failure = first_failure(logs, host="", of=folder)
    return failure.is_users


def _remove(logs: Path, run_folder: Path | None) -> None:
    """Leave no empty run folder behind a command that was wrong."""
    shutil.rmtree(logs, ignore_errors=True)
    with suppress(OSError):  # other launches' logs lie there
        logs.parent.rmdir()
        if run_folder is not None:
            run_folder.rmdir()
