"""Stop signals while a program imports its modules, before its command has handlers, and after the command has ended.

`KeyboardInterrupt` within an import is a traceback, and may leave half a module behind. Nothing was written by then, so
the program exits at once.
"""

import atexit
import os
import signal
from collections.abc import Iterator, Set
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)
"""Signals that ask a command to stop."""
SECONDS_TO_NEXT_SIGNAL = 1.0
"""A further signal counts only this long after the first: a key press may arrive twice, and a launcher forwards it."""


def exit_on_signals() -> None:
    """Let a stop signal end this program with one sentence, until its command sets handlers of its own."""
    for number in STOP_SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores HUP
            signal.signal(number, _exit)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # see `blocked_signals`
    # Registered first, so it is called last. Python then resets its handlers, and a signal would change the exit code.
    atexit.register(_ignore_signals)


@contextmanager
def blocked_signals() -> Iterator[Set[int]]:
    """Let stop signals wait within a block; a program that is started there begins with blocked signals, too.

    The value of the block is the signals that were blocked before.
    """
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield mask
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


@contextmanager
def handled_by(handler: Any) -> Iterator[None]:
    """Handle the stop signals that are not ignored by `handler` within a block.

    The previous handlers are restored, or signals are ignored if the command has ended: see `handler_after_command`.
    """
    numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    previous = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, one in previous.items():
            signal.signal(number, handler_after_command(one))


def handler_after_command(previous: Any) -> Any:
    """Return the handler that a command sets at its end, in place of its own: the `previous` one, as `getsignal` gives.

    A program whose command has ended ignores signals, which would only interrupt its exit.
    """
    return signal.SIG_IGN if previous is _exit else previous


def _ignore_signals() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _exit(number: int, _: FrameType | None) -> NoReturn:
    _ignore_signals()
    if os.environ.get("RANK", "0") == "0":
        name = signal.Signals(number).name
        with suppress(OSError):  # the terminal may be closed
            os.write(2, f"stopped by {name}: nothing was done yet. Run the same command again\n".encode())
    # The exit code of a stop in regraft/contract.py, which may not be imported yet. torchrun restarts after any but 0.
    os._exit(0 if "TORCHELASTIC_RUN_ID" in os.environ else os.EX_TEMPFAIL)
