"""A child process that is waited for, but not for ever, and that leaves nobody behind."""

import ctypes
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

from launch.local.torchrun import descendants

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_SECONDS_TO_LEAVE = 5.0


@dataclass(frozen=True, kw_only=True)
class Child:
    """A child that has ended."""

    code: int | None
    """None: it was ended, since its time was over."""
    out: str
    err: str

    def why(self, seconds: float) -> str | None:
        """Return how it failed, in one line; None where it has not. `seconds` is the time that it had."""
        if self.code == 0:
            return None
        lines = [line.strip() for line in self.err.splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line and not line.startswith(("[", "raise "))]
        last = (errors or lines or ["it has said nothing"])[-1][:300]
        if self.code is None:
            return f"no end after {seconds:.0f} s ({last})"
        return f"exit code {self.code}: {last}"


def run(command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None) -> Child:
    """Run a command to its end, or for so long; whatever it started ends with it, or with this process.

    Raises:
        OSError: it cannot be started.

    """
    launcher = os.getpid()
    process = subprocess.Popen(
        command,
        env=dict(os.environ if environment is None else environment),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches us alone
        preexec_fn=lambda: _end_with(launcher),  # noqa: PLW1509 (doctor has no threads)
    )
    try:
        out, err = process.communicate(timeout=seconds)
        return Child(code=process.returncode, out=out, err=err)
    except subprocess.TimeoutExpired:
        _end(process)
        out, err = process.communicate()
        return Child(code=None, out=out, err=err)
    except BaseException:
        _end(process)
        process.communicate()
        raise


def _end(process: subprocess.Popen[str]) -> None:
    """End a child and all that it has started: asked to first, since torchrun's processes are in other sessions."""
    known = {process.pid, *descendants(process.pid)}
    process.terminate()
    until = time.monotonic() + _SECONDS_TO_LEAVE
    with suppress(subprocess.TimeoutExpired):
        process.wait(_SECONDS_TO_LEAVE)
    while time.monotonic() < until and any(_lives(pid) for pid in known):
        time.sleep(0.05)
    for pid in known:
        if _lives(pid):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _lives(pid: int) -> bool:
    """Return whether a process is there that is ours to end; a number is not used again so soon."""
    try:
        with open(f"/proc/{pid}/stat", errors="replace") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except (OSError, IndexError):
        return False


def _end_with(launcher: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:
        os._exit(1)
