"""`attempts/`: who works on a run, and who did. One run folder, one run.

Every start that writes takes the next number by making `attempts/NNNN.json`, which only one process can. That
file says who it is, what it is doing and how it ended; its modification time is a sign of life. A later
number ends the rights of an earlier one: before anything is put in its place, `RunLock.check` looks for one, so
that a process which was taken for dead and comes back writes nothing more.
"""

import dataclasses
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically
from trainer.text import escape_unprintable

AttemptState = Literal["running", "stopped", "done", "failed"]
STATES = ("running", "stopped", "done", "failed")
ATTEMPTS = "attempts"
SECONDS_BETWEEN_SIGNS = 10.0
PATIENCE = 45.0
"""Seconds without a sign of life after which a process that cannot be looked at is taken for dead."""


@dataclass(frozen=True, kw_only=True)
class AttemptRecord:
    """What is known of an attempt."""

    attempt: int
    state: AttemptState
    """stopped: asked to, and what was made is saved; done: to the last epoch; failed: ended by an error."""
    reason: str | None = None
    """Of a stop, the signal or `the file STOP`; of a failure, the error."""
    stage: str = ""
    """The part of the run that it is at: `source`, `scratch`, or empty for the run itself."""
    step: int = 0
    """Updates made of this stage, as of its last checkpoint."""
    steps: int = 0
    """Updates of the whole stage."""
    epoch: int = 0
    """Whole epochs made of this stage."""
    epochs: int = 0
    began: str
    """UTC."""
    ended: str | None = None
    host: str
    pid: int
    """Of rank 0."""
    started: int
    """Clock ticks from the host's start to the process's: a number that is used again has another."""
    launcher: str | None = None
    """Of torchrun's processes, which torchrun: with it, a start may be the same one again."""
    pid_namespace: str
    """The host's start and the process's own space of numbers: only within one do pids mean anything."""
    lease_id: str
    """Another one for each attempt."""


class RunLock:
    """This process's right to write into a run folder, with a thread that gives a sign of life."""

    def __init__(self, folder: Path, record: AttemptRecord) -> None:
        self.folder, self.record = folder, record
        self._path = _path(folder, record.attempt)
        self._lock = threading.Lock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._heartbeat, name="sign of life", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, folder: Path, *, log: Callable[[str], object], patience: float = PATIENCE, free: int = 0
    ) -> Self:
        """Take the next number in a run folder, which is made if need be; `free` is one known to be over.

        Raises:
            UserError: another process works on the run, or the folder cannot be written to.

        """
        try:
            (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
            while True:
                number, _ = latest_attempt(folder)
                if number != free or number == 0:
                    number = wait_until_released(folder, log=log, patience=patience)
                record = _own_record(number + 1)
                with suppress(FileExistsError):
                    _create(_path(folder, number + 1), _text(record))
                    break
        except OSError as error:
            raise UserError(
                f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
            ) from None
        return cls(folder, record)

    def check(self) -> None:
        """Raise a UserError if this attempt is no longer the run's latest."""
        number, found = latest_attempt(self.folder)
        if number != self.record.attempt or found is None or found.lease_id != self.record.lease_id:
            who = f"attempt {number} on {found.host}, process {found.pid}" if found else "another attempt"
            raise UserError(
                f"{self.folder}: {who} has taken this run over from attempt {self.record.attempt}, "
                "which therefore writes nothing more. Expected one process group for each run.dir: end one of the two"
            )

    def update(self, **changes: Any) -> None:
        """Write what has become of the attempt.

        Raises:
            UserError: it is no longer the run's latest, or the disk is full.

        """
        try:
            self.check()
            with self._lock:
                self.record = dataclasses.replace(self.record, **changes)
                write_text_atomically(self._path, _text(self.record))
        except OSError as error:
            raise UserError(
                f"{self._path}: cannot be written ({error.strerror}). What was saved before is whole: make room, and "
                "the same command goes on from there"
            ) from None

    def end(self, state: AttemptState, reason: str | None = None) -> None:
        """Say how it ended, and give no more signs of life; the first word counts: what follows may be its echo."""
        if self._over.is_set():
            return
        self._over.set()
        self._thread.join()
        self.update(state=state, reason=reason and escape_unprintable(reason)[:2000], ended=_now())

    def _heartbeat(self) -> None:
        while not self._over.wait(SECONDS_BETWEEN_SIGNS):
            with suppress(OSError):  # a folder that is gone for a while; a writer meets the same and says so
                os.utime(self._path)


def latest_attempt(folder: Path) -> tuple[int, AttemptRecord | None]:
    """Return the highest number given in a run folder (0: none), and its record where that can be read."""
    try:
        names = [path.stem for path in (folder / ATTEMPTS).iterdir() if path.suffix == ".json"]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    numbers = [int(name) for name in names if name.isascii() and name.isdigit()]
    number = max(numbers, default=0)
    return number, read_record(_path(folder, number)) if number else None


def read_record(path: Path) -> AttemptRecord | None:
    """Return what an attempt's file says, or None if it is not a record: half written, or damaged."""
    try:
        record = AttemptRecord(**json.loads(path.read_text(encoding="ascii")))
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    fields = dataclasses.asdict(record)
    numbers = ("attempt", "step", "steps", "epoch", "epochs", "pid", "started")
    texts = ("began", "host", "pid_namespace", "lease_id", "stage")
    sound = (
        all(type(fields[name]) is int and fields[name] >= 0 for name in numbers)
        and all(isinstance(fields[name], str) for name in texts)
        and record.state in STATES
        and isinstance(record.launcher, str | None)
    )
    return record if sound else None


def read_attempts(folder: Path) -> list[AttemptRecord]:
    """Return what is known of the attempts of a run folder, as far as it can be read."""
    found = map(read_record, sorted((folder / ATTEMPTS).glob("*.json")))
    return [record for record in found if record is not None]


def wait_until_released(folder: Path, *, log: Callable[[str], object], patience: float = PATIENCE) -> int:
    """Return the number of the last attempt in a run folder, which is over; 0 where there was none.

    A process of this machine is looked up; one that cannot be is watched for a sign of life.

    Raises:
        UserError: it is going on.

    """
    number, earlier = latest_attempt(folder)
    if number == 0 or (earlier is not None and earlier.state != "running"):
        return number
    if earlier is not None and earlier.pid_namespace == _scope():
        lives = _start_of(earlier.pid) == earlier.started
    else:
        where = f"ran on {earlier.host}" if earlier else "has left no readable record"
        log(
            f"attempt {number} of this run {where} and has not said how it ended: looking for "
            f"{patience:.0f} s whether it still gives a sign of life"
        )
        lives = _gives_signs(_path(folder, number), patience)
        earlier = read_record(_path(folder, number))  # written to the end by now, or over
        lives = lives and (earlier is None or earlier.state == "running")
    if lives:
        who = f"process {earlier.pid} on {earlier.host}, since {earlier.began}" if earlier else "a process"
        raise UserError(
            f"run.dir {folder}: attempt {number} of this run is going on ({who}): choose another run.dir, wait for it, "
            f"or ask it to stop by a file named STOP in that folder"
        )
    return number


def _gives_signs(path: Path, patience: float) -> bool:
    def seen() -> int:
        with path.open("rb") as file:  # opened anew, a network file system asks its server
            return os.fstat(file.fileno()).st_mtime_ns

    first = seen()
    until = time.monotonic() + patience
    while time.monotonic() < until:
        time.sleep(min(1.0, patience / 4))
        if seen() != first:
            return True
    return False


def _own_record(attempt: int) -> AttemptRecord:
    started = _start_of(os.getpid())
    assert started is not None  # for mypy: this process lives
    return AttemptRecord(
        attempt=attempt,
        state="running",
        began=_now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=started,
        launcher=_launcher(),
        pid_namespace=_scope(),
        lease_id=secrets.token_hex(8),
    )


def is_torchrun_restart(folder: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether the last attempt was this very start, whose processes torchrun has started again."""
    if int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    _, last = latest_attempt(folder)
    return last is not None and last.launcher is not None and last.launcher == _launcher(environment)


def _launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    return f"{environment['TORCHELASTIC_RUN_ID']} {os.getppid()} {_start_of(os.getppid())} {_scope()}"


def _start_of(pid: int) -> int | None:
    """Return when a living process of this scope started [clock ticks since boot]; see proc(5), /proc/pid/stat."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _scope() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (no path, but a name)


def _path(folder: Path, number: int) -> Path:
    return folder / ATTEMPTS / f"{number:04}.json"


def _create(path: Path, text: str) -> None:
    """Make a file that is not there yet; raises FileExistsError if it is."""
    with path.open("x", encoding="ascii") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:  # a full disk: nobody's number
            path.unlink()
            raise


def _text(record: AttemptRecord) -> str:
    return json.dumps(dataclasses.asdict(record), indent=1) + "\n"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
