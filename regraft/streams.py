"""Standard output and standard error that are closed, lead to a reader that has gone, or cannot encode a name."""

import io
import os
import select
import sys
from contextlib import suppress


def prepare_streams() -> None:
    """Open standard streams that are closed (`>&-`), and escape characters that their encoding lacks.

    Without it, Python sets a closed stream to None, and the next file that is opened gets its number.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(handle)
    for number, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(number, "w", encoding="utf-8", closefd=False)  # noqa: SIM115 (it stays open)
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def has_reader() -> bool:
    """Return whether standard output is no pipe, or a pipe whose reader is still there (`| head` leaves early)."""
    poll = select.poll()
    with suppress(OSError, ValueError):
        poll.register(sys.stdout.fileno(), 0)
        return not any(event & select.POLLERR for _, event in poll.poll(0))
    return True


def flush_output() -> bool:
    """Flush standard output, and return whether that succeeded. Python itself would print a traceback at exit."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not isinstance(error, BrokenPipeError):
            print(f"error: standard output cannot be written ({error.strerror})", file=sys.stderr)
        discard_output()
        return False
    return True


def discard_output() -> None:
    """Send the rest of standard output to nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
