"""A run on this machine: start torchrun, stop it where starting again is of no use, say how it ended."""

import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from launch import contract
from launch.contract import Attempt
from launch.errors import LaunchError
from launch.failures import first_failure, rounds, told, users_round
from launch.local.command import Local, environment, torchrun
from launch.local.torchrun import Ended, run_agent
from launch.slurm.requeue import is_stop


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
    made = attempt if attempt is not None and attempt.attempt > before else None
    code = _tell(ended, made, local.logs)
    if made is None and code in (contract.STOPPED, contract.USER_ERROR):  # no log could tell of anything
        _remove(local.logs, run_folder if fresh else None)
    return code


def _tell(ended: Ended, made: Attempt | None, logs: Path) -> int:
    """Say how a launch ended whose last attempt is `made` (None: it came to none), and return its exit code."""
    asked, ended_well = ended.asked is not None, ended.code == 0
    if made is not None and made.state == "done":
        return contract.DONE
    if ended.insisted:
        text = "ended at once: what was saved before is whole, and the same command goes on from there"
        code = contract.INTERRUPTED
    elif made is not None and is_stop(made, asked=asked, ended_well=ended_well):
        by = signal.Signals(ended.asked).name if ended.asked is not None else made.reason
        saved = (
            f"saved after step {made.step} of {made.steps}" if made.step else "nothing new was to be saved"
        )
        text, code = f"stopped by {by}: {saved}. The same command goes on from there", contract.STOPPED
    elif ended_well:  # it was finished before
        return contract.DONE
    elif made is None and asked:
        text, code = "stopped before training began: there was nothing to save", contract.STOPPED
    else:
        failure = first_failure(logs, host=socket.gethostname())
        text, code = told(failure), contract.USER_ERROR if failure.is_users else contract.FAILED
    print(text, file=sys.stderr)
    return code


class _Rounds:
    """What torchrun's rounds of processes come to: a failure that the user has to mend ends them."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._told = 0

    def look(self) -> bool:
        """Tell of each round that failed, once the next has begun; return whether to go on."""
        found = rounds(self._logs)[self._told :]
        if users_round(self._logs, found) is not None:
            return False
        for folder in found[:-1]:
            self._told += 1
            print(
                f"{told(first_failure(self._logs, host=socket.gethostname(), of=folder))}\nstarted again",
                file=sys.stderr,
            )
        return True


def _remove(logs: Path, run_folder: Path | None) -> None:
    """Leave no empty run folder behind a command that was wrong."""
    shutil.rmtree(logs, ignore_errors=True)
    with suppress(OSError):  # other launches' logs lie there
        logs.parent.rmdir()
        if run_folder is not None:
            run_folder.rmdir()
