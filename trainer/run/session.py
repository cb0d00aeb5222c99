"""Open the run folder for one start of the trainer: lock, stop signals, watchdog, and the record of how it ended."""

import signal
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Literal, Self

from rich.console import Console

from regraft.contract import STOP, AttemptRecord, latest_attempt
from trainer.distributed.context import DistributedContext
from trainer.distributed.precision import Execution
from trainer.distributed.signals import Stopped, StopSignals
from trainer.distributed.watchdog import Heartbeat, Watchdog
from trainer.errors import UserError
from trainer.run.folder import archive_run, check_resumable, holds_run, saved_execution, write_config
from trainer.run.lock import RunLock, is_torchrun_restart, wait_until_released


@dataclass(frozen=True, kw_only=True)
class OpenRun:
    """The run folder that this start of the trainer has opened. Every process has one."""

    ctx: DistributedContext
    console: Console
    """Prints on rank 0 only."""
    signals: StopSignals
    root: Path
    """The run folder: it holds `attempts/`, `environment/` and the file STOP."""
    folder: Path
    """Folder of the phase in progress: the run folder, or one below it (`pretrain/`, `baseline/`)."""
    lock: RunLock | None
    """Rank 0's right to write into the run folder; None on the other ranks."""
    attempt: int
    """Number of this start among the run's attempts, from 1; the same on every rank."""
    hang_timeout: float | Literal["auto"] | None
    writes_report: bool = False
    """Whether report.html is written; the option run.report."""

    @property
    def is_writer(self) -> bool:
        """Return whether this process writes into the run folder."""
        return self.lock is not None

    @property
    def saved_execution(self) -> Execution | None:
        """Return the precision and memory layout that the phase in progress began with; None if it is new."""
        return saved_execution(self.folder)

    def check_lock(self) -> None:
        """Raise a UserError if another attempt has taken over the run. Ranks without the lock do nothing."""
        if self.lock is not None:
            self.lock.check()

    def start_phase(self, name: str, *, epochs: int) -> Self:
        """Return the run at the start of a phase, and record the phase. Every process must call it.

        Args:
            name: the phase's folder below the run folder; empty for the fine-tuning itself.
            epochs: number of epochs of the phase.

        Raises:
            Stopped: a signal was received since the phase before ended.

        """
        self.raise_if_signaled()

        def record() -> None:
            if self.lock is not None:
                self.lock.update(stage=name, step=0, steps=0, epoch=0, epochs=epochs)

        self.ctx.main_process_first(record)
        return replace(self, folder=self.root / name)

    def signal_received(self) -> int:
        """Return the number of a stop signal that any process received, or 0. Every process must call it."""
        return self.ctx.all_reduce_max([self.signals.received or 0])[0]

    def raise_if_signaled(self, saved: str | None = None) -> None:
        """Raise Stopped on every process if any of them received a stop signal. Every process must call it.

        `saved` is the position at which the state was saved, for the message.
        """
        if number := self.signal_received():
            raise Stopped(signal.Signals(number).name, saved=saved)

    def watchdog(self, heartbeat: Heartbeat | None = None) -> Watchdog:
        """Return the watchdog of this process. Every process must call it.

        Args:
            heartbeat: ticked by the main thread; a new one by default.

        Raises:
            UserError: a process cannot write its file for the stacks.

        """
        return self.ctx.main_process_first(
            lambda: Watchdog(
                self.hang_timeout,
                heartbeat if heartbeat is not None else Heartbeat(),
                folder=self.folder,
                attempt=self.attempt,
                rank=self.ctx.rank,
                world_size=self.ctx.world_size,
                lock=self.lock,
            )
        )

    def end(self, state: Literal["done", "stopped", "failed"], reason: str | None = None) -> None:
        """Record how this start ended. Ranks without the lock do nothing."""
        if self.lock is not None:
            self.lock.end(state, reason)

    def end_with_error(self, error: BaseException) -> None:
        """Record the error or the stop that ended this start. A failure to record it does not hide the error."""
        if self.lock is not None:
            _record_error(self.lock, error)


def open_run(
    folder: Path,
    config: str,
    *,
    resume: Literal["auto", "never", "must"],
    ctx: DistributedContext,
    console: Console,
    signals: StopSignals,
    hang_timeout: float | Literal["auto"] | None,
    writes_report: bool = False,
) -> OpenRun:
    """Open the run folder for this start: compare the config, acquire the lock, and write the config of a new run.

    Every process must call it. `ResumePoint` looks for the checkpoint later, when the data are known.

    Args:
        folder: the run folder; created if it does not exist.
        config: the resolved config as YAML.
        resume: the option run.resume.
        ctx: the distributed context.
        console: prints what was done with an earlier run.
        signals: the stop signals.
        hang_timeout: the option run.hang_timeout.
        writes_report: whether report.html is written.

    Raises:
        UserError: the folder holds another run, another process works on it, or it cannot be written.

    """
    lock = ctx.main_process_first(
        lambda: _acquire_lock(folder, config, resume, console, signals) if ctx.is_main_process else None
    )
    return OpenRun(
        ctx=ctx,
        console=console,
        signals=signals,
        root=folder,
        folder=folder,
        lock=lock,
        attempt=ctx.broadcast(lock.record.attempt if lock is not None else 0),
        hang_timeout=hang_timeout,
        writes_report=writes_report,
    )


def _acquire_lock(
    folder: Path, config: str, resume: Literal["auto", "never", "must"], console: Console, signals: StopSignals
) -> RunLock:
    # torchrun restarts the processes with the same command line, which must not archive the run again.
    if resume == "never" and is_torchrun_restart(folder):
        resume = "auto"
    message = check_resumable(folder, config, resume=resume)
    previous = latest_attempt(folder)
    released = wait_until_released(folder, log=console.print)
    with signals.deferred():  # an attempt must not end without a record of how it ended
        lock = RunLock.acquire(folder, log=console.print, released=released)
        try:
            if resume == "never" and holds_run(folder):
                lock.end("stopped", "archived")
                message = archive_run(folder)
                lock, previous = RunLock.acquire(folder, log=console.print), None
            if message is not None:
                console.print(message)
            _remove_old_stop_file(folder, previous, console)
            if not holds_run(folder):
                write_config(folder, config)  # the other ranks check that they see it
        except BaseException as error:
            _record_error(lock, error)
            raise
    return lock


def _remove_old_stop_file(folder: Path, previous: AttemptRecord | None, console: Console) -> None:
    """Remove a STOP file of an earlier start, unless it was created after that start began and it did not stop."""
    path = folder / STOP
    try:
        created = path.lstat().st_mtime
        if previous is not None and previous.state in ("running", "failed"):
            began = datetime.fromisoformat(previous.began).timestamp()
            if created > began:
                return
        path.unlink()
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{path} asks the run to stop, and cannot be removed ({error}): remove it") from None
    console.print(f"{path}: from before this start, removed")


def _record_error(lock: RunLock, error: BaseException) -> None:
    state: Literal["stopped", "failed"] = "stopped" if isinstance(error, Stopped) else "failed"
    try:
        lock.end(state, str(error) or type(error).__name__)
    except UserError as record_error:
        if str(record_error) == str(error):  # the run folder is gone
            return
        error.add_note(f"(the end could not be recorded in {lock.folder} either: {record_error})")
