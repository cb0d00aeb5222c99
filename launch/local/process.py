"""Run a child process with a time limit, and leave none of its descendants running."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from regraft.parent_death import signal_on_parent_death
from regraft.startup_signals import blocked_signals

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_GRACE_SECONDS = 5.0
"""Seconds between SIGTERM and SIGKILL."""


@dataclass(frozen=True, kw_only=True)
class ProcessResult:
    """Exit code and output of a process that has ended."""

    code: int | None
    """Exit code; None if the process was killed at its time limit."""
    stdout: str
    stderr: str

    def failure_reason(self, time_limit: float) -> str | None:
        """Return in one line why the process failed, None if it succeeded."""
        if self.code == 0:
            return None
        lines = [line.strip() for line in self.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if "rror" in line and not line.startswith(("[", "raise "))]
        last = (errors or lines or ["it printed nothing"])[-1][:300]
        if self.code is None:
            return f"not finished after {time_limit:.0f} s ({last})"
        return f"exit code {self.code}: {last}"


def run_with_timeout(
    command: Sequence[str], *, seconds: float, environment: Mapping[str, str] | None = None
) -> ProcessResult:
    """Run a command until it ends or its time is over; its descendants end with it, or with this process.

    Raises:
        OSError: the command cannot be started.

    """
    variables = dict(os.environ if environment is None else environment)
    with _started(lambda mask: _start(command, variables, mask)) as process:
        try:
            stdout, stderr = process.communicate(timeout=seconds)
            return ProcessResult(code=process.returncode, stdout=stdout, stderr=stderr)
        except subprocess.TimeoutExpired:
            _terminate_tree(process)
            stdout, stderr = process.communicate()
            return ProcessResult(code=None, stdout=stdout, stderr=stderr)


def run_trainer_program(
    program: Path, arguments: Sequence[str], *, stdout: int | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of the trainer that shares the terminal; at a stop signal, stop it and wait for it."""
    command = [sys.executable, str(program), *arguments]  # it unblocks signals: `exit_on_signals`
    with _started(lambda _: subprocess.Popen(command, stdout=stdout, text=True)) as process:
        output, _ = process.communicate()
        return subprocess.CompletedProcess(process.args, process.returncode, output)


@contextmanager
def _started(start: Callable[[Set[int]], subprocess.Popen[str]]) -> Iterator[subprocess.Popen[str]]:
    """Start a process, and end it with its descendants at an exception within the block.

    Python prints and drops an exception that a signal handler raises in a function of os.register_at_fork (logging has
    one). So signals wait until the process exists and can be ended.

    Args:
        start: starts the process; its argument is the signals that this process blocks.

    """
    process = None
    try:
        with blocked_signals() as mask:
            process = start(mask)
        yield process
    except BaseException:
        if process is not None:
            _terminate_tree(process)
            process.communicate()
        raise


def _start(command: Sequence[str], environment: dict[str, str], mask: Set[int]) -> subprocess.Popen[str]:
    """Start a process in a group of its own that ends with this one; `mask` has the signals that it blocks."""
    parent = os.getpid()

    def prepare() -> None:
        terminate_with_parent(parent)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    return subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        process_group=0,  # Ctrl-C reaches only this process, which then ends the child
        preexec_fn=prepare,  # noqa: PLW1509 (there are no other threads)
    )


def terminate_with_parent(parent: int) -> None:
    """Have the kernel send this process SIGTERM when its parent ends; call it between fork and exec."""
    signal_on_parent_death(signal.SIGTERM)
    if os.getppid() != parent:  # the parent ended before prctl was called
        os._exit(1)


def become_subreaper() -> None:
    """Make this process the parent of orphaned descendants, so that it can wait for them."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants(pid: int) -> list[int]:
    """Return the ids of all living descendants of a process, read from /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    tree = [pid]
    for parent in tree:
        tree += [child for child, its_parent in parents.items() if its_parent == parent]
    return tree[1:]


def _terminate_tree(process: subprocess.Popen[str]) -> None:
    """Send SIGTERM to a child, then SIGKILL to what is left; torchrun's processes have sessions of their own."""
    pids = {process.pid, *descendants(process.pid)}
    process.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE_SECONDS)
        while time.monotonic() < deadline and any(map(_is_alive, pids)):
            time.sleep(0.05)
    finally:  # also at a further signal
        for pid in filter(_is_alive, pids):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return stat.rpartition(")")[2].split()[0] not in "ZX"  # zombies and dead processes
    except (OSError, IndexError):
        return False
