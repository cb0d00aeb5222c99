"""Build torchrun's command line, run torchrun, forward signals to it and show the output of rank 0.

regraft --> torchrun (its own process group) --> the trainer's processes (their own sessions)

Ctrl-C reaches only regraft, which forwards it. If regraft is killed, the kernel sends SIGTERM to torchrun. If torchrun
is killed, the kernel sends SIGTERM to the trainer's processes (trainer/distributed/signals.py), which save and exit.
"""

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
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import BinaryIO, NamedTuple, Self

from launch.local.process import descendants, terminate_with_parent
from regraft.contract import LOG_FOLDER
from regraft.startup_signals import SECONDS_TO_NEXT_SIGNAL, STOP_SIGNALS

_POLL_SECONDS = 0.5
_LAUNCHER_PREFIXES = ("PET_", "TORCHELASTIC_", "ACCELERATE_")
_LAUNCHER_VARIABLES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "ROLE_RANK", "ROLE_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
_TERMINAL_OUTPUT = re.compile(rb"\x1b\[[0-9;?]*[A-Za-z]|\x1b\][^\x07]*\x07|[^\n]*\r(?!\n)")
"""Colors, cursor movements, and text that a carriage return overwrites."""


@dataclass(frozen=True, kw_only=True)
class TorchrunConfig:
    """What torchrun starts on one machine."""

    processes: int
    """Number of processes on this machine."""
    threads: int
    """CPU threads of each process."""
    max_restarts: int
    """How often torchrun restarts failed processes."""
    trainer: Path
    """Folder of the trainer's code."""
    options: tuple[str, ...]
    """Command-line options of the trainer."""
    logs: Path
    """Log folder of this launch."""


def torchrun_command(config: TorchrunConfig, rendezvous: Sequence[str] = ("--standalone", "--nnodes=1")) -> list[str]:
    """Return torchrun's command line; by default, one machine that picks a free port and a unique id."""
    # The output of rank 0 stays on the console, everything else goes to files. On several nodes, the rendezvous
    # decides which node gets rank 0, so that each node shows its first process.
    redirects = ",".join(["0:2", *(f"{rank}:3" for rank in range(1, config.processes))])
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *rendezvous,
        f"--nproc-per-node={config.processes}",
        f"--max-restarts={config.max_restarts}",
        f"--log-dir={config.logs}",
        f"--redirects={redirects}",
        str(config.trainer / "main.py"),
        *config.options,
    ]


def trainer_environment(config: TorchrunConfig, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of the trainer's processes."""
    return {
        "OMP_NUM_THREADS": str(config.threads),
        **without_launcher_variables(inherited),
        LOG_FOLDER: str(config.logs),
    }


def without_launcher_variables(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without the variables of an outer launcher.

    `PET_*` would set options of torchrun; `RANK`, `MASTER_ADDR` and so on would make the processes join another group.
    """
    return {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_LAUNCHER_PREFIXES) and name not in _LAUNCHER_VARIABLES
    }


class TorchrunResult(NamedTuple):
    """How torchrun ended."""

    code: int
    """Exit code: 1 after every signal, so the last attempt in the run folder says whether the run was saved."""
    signal: int | None
    """The first signal that was forwarded, None if there was none."""
    killed: bool = False
    """Whether a second Ctrl-C has killed all processes."""


def run_torchrun(
    command: Sequence[str],
    environment: Mapping[str, str],
    logs: Path,
    *,
    keep_running: Callable[[], bool] = lambda: True,
    on_start: Callable[[], None] = lambda: None,
) -> TorchrunResult:
    """Run torchrun to its end.

    Args:
        command: torchrun's command line, which leaves the output of rank 0 on torchrun's (`--redirects 0:2`).
        environment: complete environment of torchrun.
        logs: folder for `rank-0.log` (output of rank 0) and `torchrun.log` (messages of torchrun).
        keep_running: called every half second; once it returns False, torchrun is terminated.
        on_start: called once torchrun is started, and signals are forwarded to it.

    """
    logs.mkdir(parents=True, exist_ok=True)
    on_terminal = sys.stdout.isatty()
    (logs / "rank-0.log").touch()  # fails here if the folder is not writable
    with (logs / "torchrun.log").open("ab") as torchrun_log:
        # If our output is a terminal, rank 0 gets one too, so that it draws its progress bar.
        output, child_output = pty.openpty() if on_terminal else os.pipe()
        if on_terminal:
            _copy_window_size(child_output)
        parent = os.getpid()
        with _SignalForwarder() as forwarder:
            process = subprocess.Popen(
                command,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=child_output,
                stderr=torchrun_log,
                process_group=0,
                preexec_fn=lambda: _prepare_torchrun(parent),  # noqa: PLW1509 (no thread was started yet)
            )
            os.close(child_output)
            forwarder.forward_to(process, output if on_terminal else None)
            on_start()
            reader = threading.Thread(target=_copy_output, args=(output, logs / "rank-0.log"), daemon=True)
            reader.start()
            terminated = False
            while True:
                with suppress(subprocess.TimeoutExpired):
                    code = process.wait(_POLL_SECONDS)
                    break
                if not terminated and not keep_running():
                    terminated = True
                    process.terminate()  # only once: a second SIGTERM ends torchrun before its processes
            reader.join(timeout=5)  # a process started by a worker may keep the pipe open
        return TorchrunResult(code, forwarder.signal, forwarder.killed)


def _prepare_torchrun(parent: int) -> None:
    # These signals would kill torchrun, and Slurm sends them to all processes of a job step.
    for number in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    terminate_with_parent(parent)


class _SignalForwarder:
    """Context manager that forwards the first signal to torchrun; a second Ctrl-C kills all processes."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.killed = False
        self._process: subprocess.Popen[bytes] | None = None
        self._terminal: int | None = None
        self._signal_time = 0.0
        self._previous_handlers: dict[int, object] = {}

    def __enter__(self) -> Self:
        for number in STOP_SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous_handlers[number] = signal.signal(number, self._handle)
        self._previous_handlers[signal.SIGWINCH] = signal.signal(signal.SIGWINCH, self._resize)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def forward_to(self, process: subprocess.Popen[bytes], terminal: int | None) -> None:
        """Forward signals to this process, including one that came before it; `terminal` is its pseudo-terminal."""
        self._process, self._terminal = process, terminal
        if self.signal is not None:
            process.terminate()

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if self.signal is None:
            self.signal, self._signal_time = number, now
            if self._process is not None:
                self._process.terminate()  # SIGUSR1 and SIGUSR2 would kill torchrun, so all become SIGTERM
        elif number == signal.SIGINT and now - self._signal_time > SECONDS_TO_NEXT_SIGNAL and self._process is not None:
            self.killed = True
            for pid in [*descendants(self._process.pid), self._process.pid]:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def _resize(self, _number: int, _: FrameType | None) -> None:
        if self._terminal is not None:
            with suppress(OSError, termios.error):  # the pseudo-terminal is closed at the end
                _copy_window_size(self._terminal)


def _copy_output(source: int, path: Path) -> None:
    """Copy the output of rank 0 to the console, and to its log without terminal escape sequences."""
    with path.open("ab") as log:
        _copy(source, log)
    os.close(source)


def _copy(source: int, log: BinaryIO) -> None:
    incomplete_line, console_open = b"", True
    while chunk := _read(source):
        if console_open:
            try:
                sys.stdout.buffer.write(chunk)
                sys.stdout.buffer.flush()
            except OSError:  # the console was closed; the log continues
                console_open = False
        *lines, incomplete_line = (incomplete_line + chunk).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            log.write(_TERMINAL_OUTPUT.sub(b"", line) + b"\n")
        log.flush()
    log.write(_TERMINAL_OUTPUT.sub(b"", incomplete_line))


def _read(source: int) -> bytes:
    try:
        return os.read(source, 65536)
    except OSError:  # a pseudo-terminal reports an error when all its writers have exited
        return b""


def _copy_window_size(terminal: int) -> None:
    columns, lines = shutil.get_terminal_size()
    termios.tcsetwinsize(terminal, (lines, columns))
