"""Signals set flags; whoever trains looks at them between two updates.

TERM (a preemption, `scancel`, a launcher's end), INT (Ctrl-C), USR1 and USR2 (Slurm's warning ahead of a time
limit) and HUP (a terminal that closes) ask a run to stop. While it trains they are remembered, no more: what is
saved is saved at a boundary between updates. Before and after that there is nothing to save, and they end the
run at once.
"""

import ctypes
import os
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Self

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
SECONDS_TO_INSIST = 1.0
"""A second Ctrl-C that comes this long after the first is a person who will not wait; sooner, a launcher's echo."""
SECONDS_TO_OUTLIVE = 30.0
"""How long a trainer whose launcher has died may take to save and leave."""
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


class Stopped(BaseException):
    """The run was asked to stop, and has.

    No Exception: it may come anywhere, and is none of the failures that the code around it is ready for.
    """

    def __init__(self, reason: str, saved: str | None = None) -> None:
        """Take who asked (`SIGTERM`, `the file STOP`), and where the run stood when it was saved, if it had begun."""
        super().__init__(reason)
        self.reason = reason
        self.saved = saved


class StopSignals:
    """A context in which the stopping signals are this object's; it restores the earlier handlers."""

    def __init__(self) -> None:
        self.received: int | None = None
        """The first stopping signal that came."""
        self._only_flags = False
        self._when = 0.0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOPPING:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has HUP ignored
                self._earlier[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._earlier.clear()

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only remember the signals, for a block."""
        self._only_flags = True
        try:
            yield
        finally:
            self._only_flags = False

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if number == signal.SIGINT and now - self._when > SECONDS_TO_INSIST:
                raise KeyboardInterrupt
            return
        self.received, self._when = number, now
        if not self._only_flags:
            raise Stopped(signal.Signals(number).name)


def end_with_parent(number: int) -> None:
    """Have the kernel send this process a signal when its parent ends, even by SIGKILL."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")


def exit_with_parent() -> None:
    """Save and leave when this process's launcher ends, and leave soon in any case.

    TERM asks for it. Partners may be dead too, and an exchange with them hang in code that lets no handler run:
    so a thread sets the limit.
    """
    launcher = os.getppid()
    end_with_parent(signal.SIGTERM)

    def limit() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        time.sleep(SECONDS_TO_OUTLIVE)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=limit, name="launcher", daemon=True).start()


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether the parent is torchrun or `accelerate launch`, with which this process has to end.

    A shell is no launcher: what was started with nohup outlives it.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return True
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return False
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"accelerate" in word for word in parent[:4])
