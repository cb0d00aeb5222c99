"""End a run that hangs: write the stacks of every process, exit, and let torchrun restart the processes.

The main thread counts its progress (`Heartbeat`): it ticks between two updates, between two batches of an evaluation
and between two batches of the linear probe's pass. A second thread reads that count every second. If it has not
changed for too long (`StallDetector`), the thread writes every Python stack of the process to
`RUN/hangs/ATTEMPT-rank-RANK.txt`, reports the hang to the launcher and the console, and exits with code 1. torchrun
then ends the other processes and restarts all of them if it may.

Only seconds in which the thread itself ran count. A machine that slept, or a process that was stopped (Ctrl-Z,
`scontrol suspend`, a debugger), has not hung. For the same reason the thread cannot end a process whose main thread
hangs while it holds the GIL (torch's collectives release it). In that case faulthandler's timer, which does not need
the GIL, still writes the stacks, and the watchdogs of the other processes end the run.
"""

import faulthandler
import os
import socket
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Literal, NoReturn

from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError
from trainer.run.lock import RunLock
from trainer.text import escape_unprintable

HANGS = "hangs"
LEAST, FACTOR, PATIENT, FIRST = 300.0, 10, 1800.0, 10
"""The rule of `auto`: seconds; times the longest interval; seconds where it may take long; how many come first."""
WAITS = "waiting for the other ranks"
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_FOR_THE_OTHERS = 15.0
"""How long a process waits after its own stacks: its end would end the others before theirs are written."""
_SECONDS_TO_WRITE = 60.0
_EXIT_CODE = 1
_ADVICE = """\
The same command goes on from the newest checkpoint; torchrun --max-restarts gives it by itself.
Look at the ranks that were not waiting for the others; one whose file here holds no stacks was stopped, or is out of
reach. Was it only slow? --run.hang_timeout SECONDS. Below, the main thread comes last.
"""
_DEBUGGERS = ("bdb", "pdb", "code", "ipdb", "IPython", "pydevd", "debugpy", "_pydevd_bundle")


class Hang(Exception):
    """No step within the time allowed; its name and text are what the launcher is told."""


@dataclass
class Heartbeat:
    """Counts the boundaries that this process has passed; the main thread's side, which costs next to nothing."""

    passed: int = 0
    step: int = 0
    """Updates made, as of the last boundary."""
    extended: bool = False
    """Whether something without a pace of its own lies before the next boundary."""

    def tick(self, step: int) -> None:
        """Pass a boundary, after `step` updates."""
        self.extended = False
        self.step = max(self.step, step)
        self.passed += 1

    def extend_timeout(self) -> None:
        """Expect the way to the next boundary to take longer: a checkpoint is being written, by rank 0 alone."""
        self.extended = True


@dataclass
class StallDetector:
    """How long the next boundary may take, by how long the others have: pure, moved on by ticks of a clock."""

    timeout: float | None
    """Seconds that the user allows; None: by the rule."""
    quiet: float = 0.0
    """Seconds since the last boundary."""
    _longest: float = 0.0
    _passed: int = 0
    _waits: bool = False

    @property
    def allowed(self) -> float:
        """Return how many seconds the next boundary may take."""
        if self.timeout is not None:
            return self.timeout
        usual = max(LEAST, FACTOR * self._longest)
        return max(PATIENT, usual) if self._waits or self._passed < FIRST else usual

    def update(self, seconds: float, heartbeat: Heartbeat) -> bool:
        """Hear that some seconds have passed; returns whether the next boundary is overdue."""
        self.quiet += seconds
        if heartbeat.passed == self._passed:
            self._waits = self._waits or heartbeat.extended
            return self.quiet > self.allowed
        if self._passed and not self._waits:  # on the way to the first one, workers and kernels are started
            self._longest = max(self._longest, self.quiet)
        self.quiet, self._passed, self._waits = 0.0, heartbeat.passed, heartbeat.extended
        return False


class Watchdog:
    """A context that watches over long work: a thread, and a file for the stacks that is gone if none were written."""

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
            timeout: seconds, or by the rule; None: nothing is watched.
            beats: what the main thread counts.
            folder: the run folder.
            number: of the attempt.
            rank: of this process.
            world: number of processes.
            attempt: rank 0's; None elsewhere.

        Raises:
            UserError: the file cannot be made.

        """
        self._beats, self._rank, self._world, self._attempt = heartbeat, rank, world_size, lock
        self._pace = None if timeout is None else StallDetector(None if timeout == "auto" else timeout)
        self.path = folder / HANGS / f"{attempt:04}-rank-{rank}.txt"
        self._main = threading.get_ident()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="hang watch", daemon=True)
        if self._pace is None:
            return
        begun = f"attempt {attempt}, rank {rank} of {world_size}, host {socket.gethostname()}, process {os.getpid()}\n"
        try:
            self.path.parent.mkdir(exist_ok=True)
            if rank == 0:
                _remove_empty(self.path.parent, before=attempt)
            self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o666)
            self._empty = os.write(self._file, begun.encode())
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}); expected a run folder that every rank may write to"
            ) from None

    def __enter__(self) -> Heartbeat:
        if self._pace is not None:
            self._thread.start()
        return self._beats

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pace is None:
            return
        self._over.set()
        self._thread.join()
        faulthandler.cancel_dump_traceback_later()
        is_empty = os.fstat(self._file).st_size == self._empty
        os.close(self._file)
        with suppress(OSError):  # what is left of it says no more than that the run was here
            if is_empty:
                self.path.unlink()
                self.path.parent.rmdir()  # refused while there is another's

    def _watch(self) -> None:
        assert self._pace is not None  # for mypy: else it is not started
        pace, last, gap = self._pace, time.monotonic(), 0.0
        while True:
            between = min(_SECONDS_BETWEEN_LOOKS, pace.allowed / 20)
            # Comes to its end only if this thread, too, gets nothing done for so long.
            faulthandler.dump_traceback_later(pace.allowed, file=self._file)
            if gap > pace.allowed:
                os.ftruncate(self._file, self._empty)  # it has, and was a sleep after all
            if self._over.wait(between):
                return
            now = time.monotonic()
            gap, last = now - last, now
            if pace.update(min(gap, 2 * between), self._beats):
                stack = frames(self._main)
                if is_debugged(stack):  # a person reads
                    pace.quiet = 0.0
                else:
                    self._end(pace, stack)

    def _end(self, pace: StallDetector, stack: list[FrameType]) -> NoReturn:
        """Write the stacks, tell of them, and end the process, even if the disk is what hangs."""
        threading.Thread(target=_end_in, args=(_SECONDS_TO_WRITE,), name="hang limit", daemon=True).start()
        faulthandler.cancel_dump_traceback_later()
        what = (
            f"no step for {pace.quiet:.0f} s, the last one was {self._beats.step}; "
            f"{describe_stack(stack, world_size=self._world)}; stacks in {escape_unprintable(str(self.path))}"
        )
        text = f"{what}\n{pace.allowed:.0f} s were allowed (run.hang_timeout)\n{_ADVICE}\n"
        file = self._file
        try:
            os.write(file, text.encode())
        except OSError:  # a full disk
            file = sys.stderr.fileno()
        faulthandler.dump_traceback(file=file, all_threads=True)
        write_error_file(Hang(what))
        tell = f"[rank {self._rank}] error: {what}\n" if self._world > 1 else f"error: {what}\n"
        if os.isatty(1):
            os.write(1, b"\x1b[?25h\n")  # the progress has hidden the cursor
        with suppress(OSError):  # a terminal that is gone
            os.write(2, tell.encode())
        if self._attempt is not None:
            with suppress(UserError):  # taken over, or a full disk: this process has no more to say
                self._attempt.end("failed", what)
        if self._world > 1:
            time.sleep(min(_SECONDS_FOR_THE_OTHERS, pace.allowed / 4))
        os._exit(_EXIT_CODE)


def _remove_empty(folder: Path, *, before: int) -> None:
    """Remove what earlier attempts that were killed have left: files without stacks."""
    for path in folder.glob("*-rank-*.txt"):
        number = path.name.partition("-")[0]
        if number.isdigit() and int(number) < before and path.read_bytes().count(b"\n") == 1:
            path.unlink(missing_ok=True)


def _end_in(seconds: float) -> None:
    time.sleep(seconds)
    os._exit(_EXIT_CODE)


def frames(thread: int | None) -> list[FrameType]:
    """Return a thread's stack, the innermost call first."""
    found = []
    frame = sys._current_frames().get(thread or 0)
    while frame is not None:
        found.append(frame)
        frame = frame.f_back
    return found


def is_debugged(stack: list[FrameType]) -> bool:
    """Return whether a stack lies in a debugger that waits for its user."""
    return any(str(frame.f_globals.get("__name__")).split(".")[0] in _DEBUGGERS for frame in stack)


def describe_stack(stack: list[FrameType], *, world_size: int) -> str:
    """Return what a process was doing, as far as its innermost Python call tells; in a few words."""
    if not stack:
        return "without a main thread"
    innermost = stack[0].f_code.co_filename
    if world_size > 1 and any(part in innermost for part in ("/torch/distributed/", "/torch/autograd/")):
        return f"{WAITS} in {_place(stack[0])}"
    ours = next((frame for frame in stack if _is_ours(frame)), None)
    called = f", called from {_place(ours)}" if ours is not None and ours is not stack[0] else ""
    return f"it was in {_place(stack[0])}{called}"


def _is_ours(frame: FrameType) -> bool:
    return Path(frame.f_code.co_filename).is_relative_to(Path(__file__).parents[1])


def _place(frame: FrameType) -> str:
    path = Path(frame.f_code.co_filename)
    return f"{frame.f_code.co_name} ({'/'.join(path.parts[-2:])}:{frame.f_lineno})"
