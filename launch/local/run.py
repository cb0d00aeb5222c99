"""Train on this machine: run torchrun, stop it after errors that a restart cannot fix, and report how it ended."""

import os
import shutil
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

from launch.errors import LaunchError
from launch.failures import find_user_error, first_failure, format_failure, lost_logs, restart_dirs, was_requested_stop
from launch.interrupts import ignore_signals
from launch.local.torchrun import TorchrunConfig, TorchrunResult, run_torchrun, torchrun_command, trainer_environment
from launch.stop_signal import write_stop_signal
from regraft.contract import (
    DONE,
    FAILED,
    INTERRUPTED,
    STOPPED,
    USER_ERROR,
    AttemptRecord,
    latest_attempt,
    latest_attempt_number,
)


def run(config: TorchrunConfig, run_folder: Path) -> int:
    """Train to the end, and return the exit code.

    Returns:
        0: training is done; 75: stopped and saved; 130: killed by a second Ctrl-C; 2: an error that the user can fix;
        1: any other failure.

    Raises:
        LaunchError: the run folder is not writable.

    """
    last_number = latest_attempt_number(run_folder)
    is_new_folder = not run_folder.exists()
    monitor = _RestartMonitor(config.logs)
    try:
        result = run_torchrun(
            torchrun_command(config),
            trainer_environment(config, os.environ),
            config.logs,
            keep_running=monitor.keep_running,
            on_start=ignore_signals,  # torchrun gets them; once it has ended, the run has
        )
    except OSError as error:
        raise LaunchError(f"run.dir {run_folder}: cannot be written to ({error}); choose another folder") from None
    except KeyboardInterrupt:  # only before torchrun is started
        _remove_logs(config.logs, run_folder if is_new_folder else None)
        raise
    attempt = latest_attempt(run_folder)
    if attempt is not None and attempt.attempt <= last_number:
        attempt = None
    code = _report(result, attempt, config.logs)
    if attempt is None and code in (STOPPED, USER_ERROR):  # the logs contain nothing of use
        _remove_logs(config.logs, run_folder if is_new_folder else None)
    return code


def _report(result: TorchrunResult, attempt: AttemptRecord | None, logs: Path) -> int:
    """Print how a launch ended, and return its exit code; `attempt` is its last one, None if there was none."""
    signaled, succeeded = result.signal is not None, result.code == 0
    if attempt is not None and attempt.state == "done":
        return DONE
    if result.killed:
        message = "killed by a second Ctrl-C: earlier checkpoints are intact, run the same command to resume"
        code = INTERRUPTED
    elif attempt is not None and was_requested_stop(attempt, signaled=signaled, succeeded=succeeded):
        cause = signal.Signals(result.signal).name if result.signal is not None else attempt.reason
        if result.signal is not None:
            write_stop_signal(logs, attempt.attempt, signal.Signals(result.signal).name)
        saved = (
            f"saved after step {attempt.step} of {attempt.steps}" if attempt.step else "there was nothing new to save"
        )
        message, code = f"stopped by {cause}: {saved}. Run the same command to resume", STOPPED
    elif succeeded:  # the run was complete before
        return DONE
    elif attempt is None and signaled:
        message, code = "stopped before training started: there was nothing to save", STOPPED
    else:
        failure = first_failure(logs, host=socket.gethostname()) if logs.exists() else lost_logs(logs)
        message = format_failure(failure)
        code = USER_ERROR if failure.is_user_error else FAILED
    print(message, file=sys.stderr)
    return code


class _RestartMonitor:
    """Reports each failure that torchrun restarts from, and ends torchrun after an error that the user must fix."""

    def __init__(self, logs: Path) -> None:
        self._logs = logs
        self._reported = 0

    def keep_running(self) -> bool:
        """Report new restarts; return False after an error that the user must fix."""
        folders = restart_dirs(self._logs)[self._reported :]
        if find_user_error(self._logs, folders) is not None:
            return False
        for folder in folders[:-1]:  # the last one is still running
            self._reported += 1
            failure = first_failure(self._logs, host=socket.gethostname(), restart_dir=folder)
            print(f"{format_failure(failure)}\nrestarted", file=sys.stderr)
        return True


def _remove_logs(logs: Path, run_folder: Path | None) -> None:
    """Remove the logs, and a run folder that would stay empty; None keeps the run folder."""
    shutil.rmtree(logs, ignore_errors=True)
    with suppress(OSError):  # not empty: it has logs of other launches
        logs.parent.rmdir()
        if run_folder is not None:
            run_folder.rmdir()
