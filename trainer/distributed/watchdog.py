"""End a run that hangs: write the stacks of every process, exit, and let torchrun restart the processes.

The main thread ticks a `Heartbeat` between two updates, between two batches of an evaluation and between two batches of
the linear probe's pass. A second thread reads the number of ticks every second. If it has not changed for too long
(`StallDetector`), that thread writes every Python stack of the process and of its loader workers to
`RUN/hangs/ATTEMPT-rank-RANK.txt`, reports the hang to the launcher and the console, and exits with code 1. torchrun
then ends the other processes and restarts all of them if it may.

Only seconds in which the thread itself ran count. A machine that slept, or a process that was stopped (Ctrl-Z,
`scontrol suspend`, a debugger), has not hung. For the same reason the thread cannot end a process whose main thread
hangs while it holds the GIL (torch's collectives release it). In that case faulthandler's timer, which does not need
the GIL, still writes the stacks, and the watchdogs of the other processes end the run.
"""

import faulthandler
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, NoReturn

from regraft.contract import HANG_WAITING, HANGS
from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError
from trainer.run.lock import RunLock
from trainer.text import escape_unprintable

MIN_TIMEOUT, INTERVAL_FACTOR, EXTENDED_TIMEOUT, WARMUP_TICKS = 300.0, 10, 1800.0, 10
"""The timeout of `auto`: at least MIN_TIMEOUT seconds, and INTERVAL_FACTOR times the longest interval so far.

EXTENDED_TIMEOUT seconds are the minimum for the first WARMUP_TICKS ticks, and after `Heartbeat.extend_timeout`.
"""
_POLL_SECONDS = 1.0
_SECONDS_FOR_OTHER_RANKS = 15.0
"""How long a process waits after it has written its stacks: torchrun ends the other ranks as soon as it exits."""
_SECONDS_TO_WRITE = 60.0
_WORKER_SIGNAL = signal.SIGRTMIN + 9
"""Lets a loader worker write its stacks. Workers inherit the handler when they are forked."""
_SECONDS_FOR_WORKER = 0.2
_EXIT_CODE = 1
_ADVICE = """\
The same command resumes from the newest checkpoint; torchrun --max-restarts restarts it automatically.
Look at the ranks that were not waiting for the other ranks. A rank whose file holds no stacks was stopped, or its
machine cannot be reached. If the run was only slow, set --run.hang_timeout SECONDS. The main thread is the last below.
"""
_DEBUGGERS = ("bdb", "pdb", "code", "ipdb", "IPython", "pydevd", "debugpy", "_pydevd_bundle")


class Hang(Exception):
    """No tick within the timeout. The launcher reads the name of this class and the message."""


@dataclass
class Heartbeat:
    """Progress of the main thread, which ticks it; the watchdog's thread reads it."""

    ticks: int = 0
    step: int = 0
    """Updates completed at the last tick."""
    timeout_extended: bool = False
    """Whether the next tick may take longer."""

    def tick(self, step: int) -> None:
        """Report progress, after `step` updates."""
        self.timeout_extended = False
        self.step = max(self.step, step)
        self.ticks += 1

    def extend_timeout(self) -> None:
        """Allow more time for the next tick, for example while rank 0 writes a checkpoint."""
        self.timeout_extended = True


@dataclass
class StallDetector:
    """Decides whether the next tick is overdue. It reads no clock: `update` receives the time that has passed."""

    fixed_timeout: float | None
    """Seconds, from run.hang_timeout; None: derive the timeout from the longest interval between two ticks."""
    idle_seconds: float = 0.0
    """Seconds since the last tick."""
    _longest_interval: float = 0.0
    _ticks: int = 0
    _is_extended: bool = False

    @property
    def timeout(self) -> float:
        """Return how many seconds the next tick may take."""
        if self.fixed_timeout is not None:
            return self.fixed_timeout
        timeout = max(MIN_TIMEOUT, INTERVAL_FACTOR * self._longest_interval)
        is_long = self._is_extended or self._ticks < WARMUP_TICKS
        return max(EXTENDED_TIMEOUT, timeout) if is_long else timeout

    def update(self, seconds: float, heartbeat: Heartbeat) -> bool:
        """Add the seconds that have passed; return whether the next tick is overdue."""
        self.idle_seconds += seconds
        if heartbeat.ticks == self._ticks:
            self._is_extended = self._is_extended or heartbeat.timeout_extended
            return self.idle_seconds > self.timeout
        if self._ticks and not self._is_extended:  # before the first tick, workers and kernels start
            self._longest_interval = max(self._longest_interval, self.idle_seconds)
        self.idle_seconds, self._ticks, self._is_extended = 0.0, heartbeat.ticks, heartbeat.timeout_extended
        return False


class Watchdog:
    """Context manager that watches the main thread from a second thread.

    The file for the stacks exists while the context is open, and is removed at its end if no stacks were written.
    """

    def __init__(
        self,
        timeout: float | Literal["auto"] | None,
        heartbeat: Heartbeat,
        *,
        folder: Path,
        attempt: int,
        rank: int,
        world_size: int,
        lock: RunLock | None,
    ) -> None:
        """Open the file for the stacks.

        Args:
            timeout: the option run.hang_timeout: seconds, or `auto`; None turns the watchdog off.
            heartbeat: ticked by the main thread.
            folder: the run folder.
            attempt: number of this start.
            rank: rank of this process.
            world_size: number of processes.
            lock: rank 0's lock, to record the hang; None on the other ranks.

        Raises:
            UserError: the file cannot be created.

        """
        self._heartbeat, self._rank, self._world_size, self._lock = heartbeat, rank, world_size, lock
        self._detector = None if timeout is None else StallDetector(None if timeout == "auto" else timeout)
        self.path = folder / HANGS / f"{attempt:04}-rank-{rank}.txt"
        self._main_thread = threading.get_ident()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        if self._detector is None:
            return
        header = f"attempt {attempt}, rank {rank} of {world_size}, host {socket.gethostname()}, process {os.getpid()}\n"
        try:
            self.path.parent.mkdir(exist_ok=True)
            if rank == 0:
                _remove_empty(self.path.parent, before=attempt)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
            self._header_size = os.write(self._file, header.encode())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); expected a run folder that every rank may write to"
            ) from None

    def __enter__(self) -> Heartbeat:
        if self._detector is not None:
            faulthandler.register(_WORKER_SIGNAL, file=self._file)
            self._thread.start()
        return self._heartbeat

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._detector is None:
            return
        self._closed.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        faulthandler.unregister(_WORKER_SIGNAL)
        is_empty = os.fstat(self._file).st_size == self._header_size
        os.close(self._file)
        with suppress(OSError):  # a leftover file does no harm
            if is_empty:
                self.path.unlink()
                self.path.parent.rmdir()  # fails while another rank's file is there

    def _watch(self) -> None:
        assert self._detector is not None  # for mypy: the thread is not started without it
        detector, last_poll, gap = self._detector, time.monotonic(), 0.0
        while True:
            poll_seconds = min(_POLL_SECONDS, detector.timeout / 20)
            # Restarted at every poll: it writes the stacks only if this thread, too, cannot run for so long.
            faulthandler.dump_traceback_later(detector.timeout, file=self._file)
            if gap > detector.timeout:
                os.ftruncate(self._file, self._header_size)  # it did, but the process was only suspended
            if self._closed.wait(poll_seconds):
                return
            now = time.monotonic()
            gap, last_poll = now - last_poll, now
            # A longer gap means that the process was suspended: those seconds do not count.
            if detector.update(min(gap, 2 * poll_seconds), self._heartbeat):
                stack = stack_of(self._main_thread)
                if is_debugged(stack):
                    detector.idle_seconds = 0.0
                else:
                    self._end(detector, stack)

    def _end(self, detector: StallDetector, stack: list[FrameType]) -> NoReturn:
        """Write the stacks, report the hang, and end the process, even if the disk is what hangs."""
        threading.Thread(target=_exit_after, args=(_SECONDS_TO_WRITE,), name="watchdog limit", daemon=True).start()
        faulthandler.cancel_dump_traceback_later()
        message = (
            f"no step for {detector.idle_seconds:.0f} s, the last one was {self._heartbeat.step}; "
            f"{describe_stack(stack, world_size=self._world_size)}; stacks in {escape_unprintable(str(self.path))}"
        )
        text = f"{message}\n{detector.timeout:.0f} s were allowed (run.hang_timeout)\n{_ADVICE}\n"
        file = self._file
        try:
            os.write(file, text.encode())
        except OSError:  # the disk is full
            file = sys.stderr.fileno()
        _write_worker_stacks(self._file)
        faulthandler.dump_traceback(file=file, all_threads=True)
        write_error_file(Hang(message))
        prefix = f"[rank {self._rank}] " if self._world_size > 1 else ""
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # show the cursor, which the progress bar has hidden
        with suppress(OSError):  # the terminal is closed
            os.write(2, f"{prefix}error: {message}\n".encode())
        if self._lock is not None:
            with suppress(UserError):  # another attempt has taken over, or the disk is full
                self._lock.end("failed", message)
        if self._world_size > 1:
            time.sleep(min(_SECONDS_FOR_OTHER_RANKS, detector.timeout / 4))
        os._exit(_EXIT_CODE)


def _remove_empty(folder: Path, *, before: int) -> None:
    """Remove the files without stacks that killed processes of earlier attempts have left."""
    for path in folder.glob("*-rank-*.txt"):
        attempt = path.name.partition("-")[0]
        if attempt.isdigit() and int(attempt) < before and path.read_bytes().count(b"\n") == 1:
            path.unlink(missing_ok=True)


def _write_worker_stacks(file: int) -> None:
    """Let each worker process write its stacks into the open file."""
    for worker in multiprocessing.active_children():
        with suppress(OSError):  # the worker has ended, or the disk is full
            os.write(file, f"\nworker process {worker.pid}\n".encode())
            os.kill(worker.pid or 0, _WORKER_SIGNAL)
            time.sleep(_SECONDS_FOR_WORKER)
    with suppress(OSError):
        os.write(file, b"\n")


def _exit_after(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(_EXIT_CODE)


def stack_of(thread: int | None) -> list[FrameType]:
    """Return a thread's stack, the innermost call first."""
    stack = []
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        stack.append(frame)
        frame = frame.f_back
    return stack


def is_debugged(stack: list[FrameType]) -> bool:
    """Return whether a debugger waits for its user in this stack."""
    return any(str(frame.f_globals.get("__name__")).split(".")[0] in _DEBUGGERS for frame in stack)


def describe_stack(stack: list[FrameType], *, world_size: int) -> str:
    """Return in a few words what a process was doing, from its innermost Python calls."""
    if not stack:
        return "without a main thread"
    innermost = stack[0].f_code.co_filename
    if world_size > 1 and any(folder in innermost for folder in ("/torch/distributed/", "/torch/autograd/")):
        return f"{HANG_WAITING} in {_describe_frame(stack[0])}"
    caller = next((frame for frame in stack if _is_in_trainer(frame)), None)
    called_from = f", called from {_describe_frame(caller)}" if caller is not None and caller is not stack[0] else ""
    return f"it was in {_describe_frame(stack[0])}{called_from}"


def _is_in_trainer(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _describe_frame(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(path.parts[-2:])}:{frame.f_lineno})"
