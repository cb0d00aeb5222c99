"""Stop signals of the launcher's own commands.

While a run trains, `regraft train` forwards them instead: see launch/local/torchrun.py.
"""

import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from regraft.startup_signals import SECONDS_TO_NEXT_SIGNAL, blocked_signals, handled_by


class Interrupted(KeyboardInterrupt):
    """A stop signal was received; the text is its name, such as SIGTERM."""


class _Interrupter:
    """Handler of stop signals that raises Interrupted until it is told to stop."""

    def __init__(self) -> None:
        self.is_active = False
        self.raised_at = -math.inf

    def handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.is_active and now - self.raised_at >= SECONDS_TO_NEXT_SIGNAL:
            self.raised_at = now
            raise Interrupted(signal.Signals(number).name)


_interrupter = _Interrupter()


@contextmanager
def interruptible() -> Iterator[None]:
    """Raise Interrupted within a block at a stop signal, and at each that follows at least one second later.

    Python drops an exception that is raised in a destructor, and a clean-up may hang; so one signal may not be enough.
    """
    _interrupter.is_active, _interrupter.raised_at = True, -math.inf
    with handled_by(_interrupter.handle):
        try:
            yield
        finally:
            ignore_signals()  # first, since handlers are restored one after the other


def ignore_signals() -> None:
    """Do nothing at stop signals until the block of `interruptible` ends: the result of the command is certain."""
    _interrupter.is_active = False


def exec_python(arguments: Sequence[str]) -> NoReturn:
    """Replace this process by a program in Python; signals wait until it calls `protect_imports`."""
    with blocked_signals():
        os.execv(sys.executable, [sys.executable, *arguments])
