"""A run on this machine: start torchrun, show rank 0, pass signals on, leave no orphan, say why it failed."""

import ctypes
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import termios
import threading
import time
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from launch import contract
from launch.command import Local, environment, torchrun
from launch.failures import first_failure, told

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_TO_INSIST = 1.0
"""A second Ctrl-C, this long after the first, is meant."""
_PR_SET_PDEATHSIG = 1
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[^\n]*\r(?!\n)")
"""Colours, movements of the cursor, and what was written over in its line."""


def run(local: Local, run_folder: Path) -> int:
    """Run to the end, and return the exit code: 0 done, 75 stopped and saved, 2 the user's to mend, 1 failed."""
    before = contract.last_number(run_folder)
    local.logs.mkdir(parents=True, exist_ok=True)
    with (local.logs / "torchrun.log").open("ab") as agent_log, (local.logs / "rank-0.log").open("ab") as log:
        master, slave = pty.openpty() if sys.stdout.isatty() else os.pipe()
        if sys.stdout.isatty():
            _copy_window(slave)
        process = subprocess.Popen(
            torchrun(local),
            env=environment(local, os.environ),
            stdin=subprocess.DEVNULL,
            stdout=slave,
            stderr=agent_log,
            process_group=0,  # Ctrl-C reaches us alone, and is passed on once
            preexec_fn=_end_with_launcher,  # noqa: PLW1509 (no thread has been started yet)
        )
        os.close(slave)
        relay = _Relay(process)
        shower = threading.Thread(target=_show, args=(master, log), daemon=True)
        shower.start()
        code = process.wait()
        shower.join(timeout=5)  # a worker's child may hold the pipe open
        relay.close()
    return _verdict(code, before, local, run_folder)


def _end_with_launcher() -> None:
    """Have torchrun end when this launcher does; its processes end with it (trainer/signals.py)."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)


class _Relay:
    """Passes signals on to torchrun, each once; a second Ctrl-C ends all at once."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._first = 0.0
        self._earlier = {
            number: signal.signal(number, self._came)
            for number in PASSED_ON
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        if sys.stdout.isatty():
            self._earlier[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, lambda *_: None)

    def _came(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._first:
            self._first = now
            # torchrun dies of USR1 and USR2 unless told otherwise; for the trainer all of them mean the same.
            self._process.send_signal(
                signal.SIGTERM if number in (signal.SIGUSR1, signal.SIGUSR2) else number
            )
        elif number == signal.SIGINT and now - self._first > SECONDS_TO_INSIST:
            for pid in descendants(self._process.pid):
                _kill(pid)
            self._process.kill()

    def close(self) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)


def descendants(pid: int) -> list[int]:
    """Return the living processes below `pid`, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return


def _show(source: int, log: BinaryIO) -> None:
    """Copy rank 0's output to the console as it comes, and to its log without what a terminal alone can use."""
    pending = b""
    while True:
        try:
            some = os.read(source, 65536)
        except OSError:  # how a terminal's other end says that all have left it
            some = b""
        if not some:
            break
        sys.stdout.buffer.write(some)
        sys.stdout.buffer.flush()
        *lines, pending = (pending + some).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            log.write(_ESCAPES.sub(b"", line) + b"\n")
        log.flush()
    log.write(_ESCAPES.sub(b"", pending))
    os.close(source)


def _copy_window(terminal: int) -> None:
    columns, lines = shutil.get_terminal_size()
    termios.tcsetwinsize(terminal, (lines, columns))


def _verdict(code: int, before: int, local: Local, run_folder: Path) -> int:
    attempt = contract.latest_attempt(run_folder)
    if attempt is not None and attempt.attempt > before:
        if attempt.state == "done":
            return contract.DONE
        if attempt.state == "stopped":
            print(
                f"stopped by {attempt.reason}: saved after step {attempt.step} of {attempt.steps}. The same command "
                "goes on from there",
                file=sys.stderr,
            )
            return contract.STOPPED
    if code == 0:
        return contract.DONE
    failure = first_failure(local.logs, host=socket.gethostname())
    print(told(failure), file=sys.stderr)
    return contract.USER_ERROR if failure.what.startswith("error: ") else 1
