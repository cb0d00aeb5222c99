"""Signals set flags, which the training loop reads between two updates.

TERM (a preemption, `scancel`, the end of a launcher), INT (Ctrl-C), USR1 and USR2 (Slurm's warning before a time limit)
and HUP (a closed terminal) ask a run to stop. During training they are only recorded, and the state is saved between
two updates. Before and after training there is nothing to save, and they end the run at once.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Self

from regraft.parent_death import signal_on_parent_death
from regraft.startup_signals import SECONDS_TO_NEXT_SIGNAL, STOP_SIGNALS, handler_after_command

_SECONDS_TO_RAISE_AGAIN = 0.05
SECONDS_AFTER_LAUNCHER = 30.0
"""How long a trainer whose launcher has died may take to save and exit."""


class Stopped(BaseException):
    """The run was asked to stop, and has stopped.

    It is not an Exception: it may be raised anywhere, and must not be handled as a failure there.
    """

    def __init__(self, reason: str, saved: str | None = None) -> None:
        """Take the reason (`SIGTERM`, `the file STOP`), and the position at which the state was saved, if it was."""
        super().__init__(reason)
        self.reason = reason
        self.saved = saved


class StopSignals:
    """Context manager that handles the stop signals, and restores the previous handlers at its end."""

    def __init__(self) -> None:
        self.received: int | None = None
        """Number of the first stop signal received, or None."""
        self._deferred = False
        self._received_at = 0.0
        self._dropped: BaseException | None = None
        """Exception of the handler that Python has dropped."""
        self._timer: threading.Timer | None = None
        self._pid = os.getpid()
        self._previous_handlers: dict[int, Any] = {}
        self._previous_hook = sys.unraisablehook

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
                self._previous_handlers[number] = handler_after_command(signal.signal(number, self._handle))
        self._previous_hook, sys.unraisablehook = sys.unraisablehook, self._on_unraisable
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._deferred = True  # the command has ended
        if self._timer is not None:
            self._timer.cancel()
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers.clear()
        sys.unraisablehook = self._previous_hook

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Only record signals within a block, instead of raising Stopped."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False

    def raise_if_received(self) -> None:
        """Raise Stopped if a signal was received within a block of `deferred`."""
        if self.received is not None:
            raise Stopped(signal.Signals(self.received).name)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader worker that has not set its own handlers yet; the trainer ends it
            return
        if self._dropped is not None:
            dropped, self._dropped = self._dropped, None
            if not self._deferred or isinstance(dropped, KeyboardInterrupt):
                raise dropped
            return
        now = time.monotonic()
        if self.received is not None:
            if number == signal.SIGINT and now - self._received_at > SECONDS_TO_NEXT_SIGNAL:
                raise KeyboardInterrupt
            return
        self.received, self._received_at = number, now
        if not self._deferred:
            raise Stopped(signal.Signals(number).name)

    def _on_unraisable(self, unraisable: "sys.UnraisableHookArgs") -> None:
        """Raise the exception of a stop again if it was raised where Python drops exceptions.

        Such places are `__del__`, callbacks of weak references, and functions of `os.register_at_fork`.
        """
        error = unraisable.exc_value
        if not isinstance(error, Stopped | KeyboardInterrupt):
            self._previous_hook(unraisable)
        elif os.getpid() == self._pid and self.received is not None:
            self._dropped = error.with_traceback(None)
            # Later, since an exception of this function would be dropped, too.
            arguments = (threading.main_thread().ident, self.received)
            self._timer = threading.Timer(_SECONDS_TO_RAISE_AGAIN, signal.pthread_kill, arguments)
            self._timer.start()


def exit_with_parent() -> None:
    """Save and exit when this process's launcher ends, and exit soon in any case.

    TERM asks to save. Peers may be dead too, and a collective with them may hang in code that runs no signal
    handler, so a thread enforces a time limit.
    """
    launcher = os.getppid()
    signal_on_parent_death(signal.SIGTERM)

    def limit() -> None:
        while os.getppid() == launcher:
            time.sleep(1.0)
        time.sleep(SECONDS_AFTER_LAUNCHER)
        os._exit(128 + signal.SIGTERM)

    threading.Thread(target=limit, name="launcher", daemon=True).start()


def has_launcher(environment: Mapping[str, str]) -> bool:
    """Return whether the parent is torchrun or `accelerate launch`, with which this process has to end.

    A shell is not a launcher: a process started with nohup outlives it.
    """
    if "TORCHELASTIC_RUN_ID" in environment:
        return True
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return False
    try:
        parent = Path(f"/proc/{os.getppid()}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return False
    return any(b"accelerate" in argument for argument in parent[:4])
