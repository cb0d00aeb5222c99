"""Stop signals of the launcher's own commands.

While a run trains, `regraft train` forwards them instead: see launch/local/torchrun.py.
"""

import signal
from contextlib import AbstractContextManager
from types import FrameType

from regraft.startup_signals import blocked_signals, handled_by

__all__ = ["Interrupted", "blocked_signals", "interruptible"]


class Interrupted(KeyboardInterrupt):
    """A stop signal was received; the text is its name, such as SIGTERM."""


def interruptible() -> AbstractContextManager[None]:
    """Raise Interrupted within a block at the first stop signal; a later one does not interrupt the clean-up."""
    is_interrupted = False

    def handle(number: int, _: FrameType | None) -> None:
        nonlocal is_interrupted
        if not is_interrupted:
            is_interrupted = True
            raise Interrupted(signal.Signals(number).name)

    return handled_by(handle)
