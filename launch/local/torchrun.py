"""torchrun as a child: show what rank 0 says, pass signals on once, leave no orphan.

regraft --> torchrun (its own process group) --> the trainer's processes (sessions of their own)

Ctrl-C reaches regraft alone, which passes it on. If regraft is killed, the kernel sends torchrun TERM, which passes
that on; if torchrun is killed, the kernel sends the trainer's processes TERM (trainer/signals.py). They save and leave.
"""

import ctypes
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, NamedTuple, Self

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
SECONDS_TO_INSIST = 1.0
"""A second Ctrl-C, this long after the first, is meant."""
_SECONDS_BETWEEN_LOOKS = 0.5
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ESCAPES = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[^\n]*\r(?!\n)")
"""Colours, movements of the cursor, and what was written over in its line."""


class Ended(NamedTuple):
    """How torchrun ended."""

    code: int
    """1 after every signal, whatever became of the processes: the run folder's last attempt says more."""
    asked: int | None
    """The first signal that was passed on, None if there was none."""
    insisted: bool = False
    """Whether a second Ctrl-C has ended all at once."""


def run_agent(
    command: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    *,
    look: Callable[[], bool] = lambda: True,
) -> Ended:
    """Run torchrun to its end.

    Args:
        command: its command line, which leaves rank 0's standard output to it (`--redirects 0:2`).
        environment: whole.
        logs: folder for `rank-0.log` (what rank 0 said) and `torchrun.log` (what torchrun did).
        look: called every half second; once it returns False, torchrun is asked to end.

    """
    logs.mkdir(parents=True, exist_ok=True)
    on_terminal = sys.stdout.isatty()
    (logs / "rank-0.log").touch()  # a folder that cannot be written to is noticed here
    with (logs / "torchrun.log").open("ab") as agents:
        # A terminal for a terminal, so that rank 0 draws its progress as it would without us.
        source, sink = pty.openpty() if on_terminal else os.pipe()
        if on_terminal:
            _copy_window(sink)
        launcher = os.getpid()
        with _Relay() as relay:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=sink,
                stderr=agents,
                process_group=0,
                preexec_fn=lambda: _end_with(launcher),  # noqa: PLW1509 (no thread has been started yet)
            )
            os.close(sink)
            relay.to(process, source if on_terminal else None)
            shower = threading.Thread(target=_show, args=(source, logs / "rank-0.log"), daemon=True)
            shower.start()
            goes_on = True
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_SECONDS_BETWEEN_LOOKS)
                    break
                if goes_on and not look():
                    goes_on = False
                    process.terminate()  # once: a further TERM would end torchrun before its processes
            shower.join(timeout=5)  # a worker's own child may hold the other end open
        return Ended(code, relay.asked, relay.insisted)


def _end_with(launcher: int) -> None:
    """Have this process, torchrun to be, end when its launcher does, and not by what is the launcher's to pass on."""
    for number in (
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):  # of which it would die; Slurm signals all processes of a step
        signal.signal(number, signal.SIG_IGN)
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:  # it has ended in between
        os._exit(1)


class _Relay:
    """A context in which signals are torchrun's: the first is passed on; a second Ctrl-C ends all at once."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.insisted = False
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal: int | None = None
        self._when = 0.0
        self._earlier: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in PASSED_ON:
            if signal.getsignal(number) is not signal.SIG_IGN:  # as nohup has HUP ignored
                self._earlier[number] = signal.signal(number, self._came)
        self._earlier[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._resized)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._earlier.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def to(self, process: subprocess.Popen[bytes], terminal: int | None) -> None:
        """Pass signals on to a process, the one that came meanwhile first; `terminal` is the other end of its own."""
        self._process, self._terminal = process, terminal
        if self.asked is not None:
            process.terminate()

    def _came(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.asked is None:
            self.asked, self._when = number, now
            if self._process is not None:
                self._process.terminate()  # torchrun dies of USR1 and USR2; to the trainer, all of them are one
        elif number == signal.SIGINT and now - self._when > SECONDS_TO_INSIST and self._process is not None:
            self.insisted = True
            for pid in [*descendants(self._process.pid), self._process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _resized(self, _number: int, _: FrameType | None) -> None:
        if self._terminal is not None:
            with suppress(OSError, termios.error):  # it is closed at the end
                _copy_window(self._terminal)


def descendants(pid: int) -> list[int]:
    """Return the living processes below `pid`, by /proc."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text(errors="replace").rpartition(")")[2].split()
            except OSError:
                continue
            parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for parent in found:
        found += [child for child, of in parents.items() if of == parent]
    return found[1:]


def _show(source: int, path: Path) -> None:
    """Copy rank 0's output to the console as it comes, and to its log without what a terminal alone can use."""
    with path.open("ab") as log:
        _copy(source, log)
    os.close(source)


def _copy(source: int, log: BinaryIO) -> None:
    pending, shown = b"", True
    while some := _some(source):
        if shown:
            try:
                sys.stdout.buffer.write(some)
                sys.stdout.buffer.flush()
            except OSError:  # a console that is gone; the log goes on
                shown = False
        *lines, pending = (pending + some).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            log.write(_ESCAPES.sub(b"", line) + b"\n")
        log.flush()
    log.write(_ESCAPES.sub(b"", pending))


def _some(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # how a terminal's other end says that all have left it
        return b""


def _copy_window(terminal: int) -> None:
    columns, lines = shutil.get_terminal_size()
    termios.tcsetwinsize(terminal, (lines, columns))
