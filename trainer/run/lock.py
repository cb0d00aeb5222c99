"""The lock of a run folder: the numbered files in `attempts/` decide which process may write.

A start takes the next number by creating `attempts/NNNN.json`, which only one process can do. The file records the
process, the position of the run and how the start ended; its modification time is a heartbeat. A later number fences
off an earlier one: `RunLock.check` looks for one before any file is put in place. So a process that was presumed dead,
and continues, writes nothing more.
"""

import dataclasses
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

from regraft.contract import (
    ATTEMPTS,
    AttemptRecord,
    AttemptState,
    attempt_path,
    latest_attempt,
    latest_attempt_number,
    read_attempt,
)
from trainer.errors import UserError
from trainer.run.atomic import describe_missing, write_text_atomically
from trainer.text import escape_unprintable

HEARTBEAT_SECONDS = 10.0
HEARTBEAT_TIMEOUT = 45.0
"""Seconds without a heartbeat after which a process of another machine is presumed dead."""


class RunLock:
    """The right of this process to write into a run folder. A thread sends its heartbeat."""

    def __init__(self, folder: Path, record: AttemptRecord) -> None:
        self.folder, self.record = folder, record
        self._path = attempt_path(folder, record.attempt)
        self._write_lock = threading.Lock()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._send_heartbeats, name="heartbeat", daemon=True)
        self._thread.start()

    @classmethod
    def acquire(
        cls, folder: Path, *, log: Callable[[str], object], timeout: float = HEARTBEAT_TIMEOUT, released: int = 0
    ) -> Self:
        """Take the next number in a run folder, which is created if it does not exist.

        Args:
            folder: the run folder.
            log: prints that this process waits for a heartbeat of an earlier one.
            timeout: seconds to wait for that heartbeat.
            released: number of an attempt that is known to have ended; 0 for none.

        Raises:
            UserError: another process works on the run, or the folder cannot be written to.

        """
        try:
            (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
            while True:
                number = latest_attempt_number(folder)
                if number != released or number == 0:
                    number = wait_until_released(folder, log=log, timeout=timeout)
                record = _own_record(number + 1)
                with suppress(FileExistsError):
                    _create(attempt_path(folder, number + 1), record.to_json())
                    break
        except OSError as error:
            raise UserError(
                f"run.dir {folder}: cannot be written to ({error.strerror}); choose another folder"
            ) from None
        return cls(folder, record)

    def check(self) -> None:
        """Raise a UserError if this attempt is no longer the run's latest, or the run folder is gone."""
        number = latest_attempt_number(self.folder)
        if number < self.record.attempt and (message := describe_missing(self._path / "_")) is not None:
            raise UserError(message)
        latest = read_attempt(attempt_path(self.folder, number))
        if number != self.record.attempt or latest is None or latest.lease_id != self.record.lease_id:
            who = f"attempt {number} on {latest.host}, process {latest.pid}" if latest else "another attempt"
            raise UserError(
                f"{self.folder}: {who} has taken over this run from attempt {self.record.attempt}, which therefore "
                "writes nothing more. Expected one process group for each run.dir: end one of the two"
            )

    def update(self, **changes: Any) -> None:
        """Record changed fields of the attempt.

        Raises:
            UserError: it is no longer the run's latest, or the disk is full.

        """
        try:
            self.check()
            with self._write_lock:
                self.record = dataclasses.replace(self.record, **changes)
                write_text_atomically(self._path, self.record.to_json())
        except OSError as error:
            raise UserError(
                describe_missing(self._path, error)
                or f"{self._path}: cannot be written ({error.strerror}). What was saved before is whole: make room, "
                "and the same command resumes from there"
            ) from None

    def begin_training(self, **position: int) -> None:
        """Record the position of the run, and in the first phase the time; see `update`."""
        self.update(**position, training_began=self.record.training_began or _now())

    def end(self, state: AttemptState, reason: str | None = None) -> None:
        """Record how the attempt ended, and stop its heartbeat. Later calls do nothing: the first cause counts."""
        if self._ended.is_set():
            return
        self._ended.set()
        self._thread.join()
        self.update(state=state, reason=reason and escape_unprintable(reason)[:2000], ended=_now())

    def _send_heartbeats(self) -> None:
        while not self._ended.wait(HEARTBEAT_SECONDS):
            with suppress(OSError):  # the folder may be away for a while; the next write reports it
                os.utime(self._path)


def wait_until_released(folder: Path, *, log: Callable[[str], object], timeout: float = HEARTBEAT_TIMEOUT) -> int:
    """Wait until the last attempt in a run folder is known to have ended; return its number, or 0 if there is none.

    A process of this machine is looked up by its pid. For other processes, wait for a heartbeat.

    Raises:
        UserError: the last attempt is still running.

    """
    number = latest_attempt_number(folder)
    latest = read_attempt(attempt_path(folder, number))  # of this number: a later attempt may have begun meanwhile
    if number == 0 or (latest is not None and latest.state != "running"):
        return number
    if latest is not None and latest.pid_namespace == _pid_namespace():
        is_alive = _process_start(latest.pid) == latest.started
    else:
        where = f"ran on {latest.host}" if latest else "has left no readable record"
        log(
            f"attempt {number} of this run {where} and did not record how it ended: waiting {timeout:.0f} s for a "
            "heartbeat"
        )
        is_alive = _has_heartbeat(attempt_path(folder, number), timeout)
        latest = read_attempt(attempt_path(folder, number))  # it may have ended meanwhile
        is_alive = is_alive and (latest is None or latest.state == "running")
    if is_alive:
        who = f"process {latest.pid} on {latest.host}, since {latest.began}" if latest else "a process"
        raise UserError(
            f"run.dir {folder}: attempt {number} of this run is still running ({who}): choose another run.dir, wait "
            "for it, or ask it to stop by a file named STOP in that folder"
        )
    return number


def _has_heartbeat(path: Path, timeout: float) -> bool:
    def modified() -> int:
        with path.open("rb") as file:  # open: a network file system then asks its server
            return os.fstat(file.fileno()).st_mtime_ns

    first = modified()
    deadline = time.monotonic() + timeout
    while time.monotonic() < deadline:
        time.sleep(min(1.0, timeout / 4))
        if modified() != first:
            return True
    return False


def _own_record(attempt: int) -> AttemptRecord:
    started = _process_start(os.getpid())
    assert started is not None  # for mypy: this process is alive
    return AttemptRecord(
        attempt=attempt,
        state="running",
        began=_now(),
        host=socket.gethostname(),
        pid=os.getpid(),
        started=started,
        launcher=_launcher(),
        pid_namespace=_pid_namespace(),
        lease_id=secrets.token_hex(8),
    )


def is_torchrun_restart(folder: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Return whether torchrun has restarted the processes of the last attempt."""
    if int(environment.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0:
        return True
    latest = latest_attempt(folder)
    return latest is not None and latest.launcher is not None and latest.launcher == _launcher(environment)


def _launcher(environment: Mapping[str, str] = os.environ) -> str | None:
    if "TORCHELASTIC_RUN_ID" not in environment:
        return None
    parent = os.getppid()
    return f"{environment['TORCHELASTIC_RUN_ID']} {parent} {_process_start(parent)} {_pid_namespace()}"


def _process_start(pid: int) -> int | None:
    """Return the start of a running process in clock ticks since boot, None if it has ended; see proc(5)."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    state, *fields = text.rpartition(")")[2].split()
    return None if state in "ZX" else int(fields[18])


def _pid_namespace() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    return f"{boot} {os.readlink('/proc/self/ns/pid')}"  # noqa: PTH115 (not a path)


def _create(path: Path, text: str) -> None:
    """Create a file; raise FileExistsError if it exists."""
    with path.open("x", encoding="ascii") as file:
        try:
            file.write(text)
            file.flush()
        except OSError:  # the disk is full: do not take the number
            path.unlink()
            raise


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
