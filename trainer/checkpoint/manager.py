"""The checkpoint manager: between two updates, all processes agree to save, to stop, or that one of them has failed.

The agreement costs one small all-reduce on the CPU for each update. A checkpoint costs the training loop a copy of the
state; a thread of rank 0 writes the copy.
"""

import signal
import time
from contextlib import suppress
from types import TracebackType
from typing import Any, Protocol, Self

from regraft.contract import MODEL, STOP, STOP_FILE
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import CheckpointId
from trainer.checkpoint.store import CorruptCheckpoint
from trainer.distributed.signals import Stopped
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations
from trainer.loop import StepDecision
from trainer.metrics import BestEpoch
from trainer.optim.schedule import TrainSchedule
from trainer.run.session import OpenRun
from trainer.state import TrainState

_STOP_FILE_FLAG = 1 << 10  # above the number of every signal
_SECONDS_BETWEEN_STOP_FILE_CHECKS = 1.0


class MetricsLog(Protocol):
    """The metrics of the run on rank 0. They are empty on the other ranks."""

    @property
    def failure(self) -> UserError | None:
        """Return why metrics could not be written, or None."""

    @property
    def epochs(self) -> list[dict[str, Any]]:
        """Return the rows of whole epochs in metrics.jsonl."""

    @property
    def text(self) -> str:
        """Return metrics.jsonl so far."""


class CheckpointManager:
    """Saves checkpoints and the best model, and decides when to stop. A context manager around the training loop."""

    def __init__(
        self,
        run: OpenRun,
        state: TrainState,
        schedule: TrainSchedule,
        *,
        saver: CheckpointSaver,
        retention: RetentionPolicy,
        early_stopping: EarlyStopping,
        logger: MetricsLog,
    ) -> None:
        """Start from the state's position.

        Args:
            run: the open run folder.
            state: the training state. The manager updates its best epoch.
            schedule: the updates of the run.
            saver: writes the files.
            retention: decides when a checkpoint is due.
            early_stopping: decides whether to end the run before its last epoch.
            logger: holds the metrics that are saved with each checkpoint.

        """
        self._run, self._state, self._schedule, self._saver = run, state, schedule, saver
        self._retention, self._early_stopping, self._logger = retention, early_stopping, logger
        self.stopped_early = False
        """Whether early stopping has ended the run after the last completed epoch."""
        self.heartbeat = Heartbeat(step=state.step)
        """For the watchdog: ticked between updates."""
        self._last_saved = CheckpointId(state.step, state.epoch) if state.step else None
        self._saved_at = time.monotonic()
        self._stop_file_checked_at = 0.0
        self._stop_file_found = False

    def sync_flags(self) -> StepDecision:
        """Return what all processes do after the last completed update.

        Raises:
            UserError: one of the processes has failed. Its error is raised on all of them.

        """
        ctx = self._run.ctx
        failure = (self._saver.failure or self._logger.failure) if ctx.is_main_process else None
        seconds = time.monotonic() - self._saved_at
        due = ctx.is_main_process and self._retention.should_save(self._state.step, seconds)
        stop, save_now, failed = ctx.all_reduce_max([self._stop_flag(), due, failure is not None])
        self.heartbeat.tick(self._state.step)
        if failed:
            ctx.raise_on_all_ranks(failure)
        reason = STOP_FILE if stop == _STOP_FILE_FLAG else signal.Signals(stop).name if stop else None
        return StepDecision(save=bool(save_now), stop=reason)

    def _stop_flag(self) -> int:
        """Return the number of the received signal, `_STOP_FILE_FLAG` for the file STOP, or 0."""
        if self._run.is_writer and not self._stop_file_found:
            now = time.monotonic()
            if now - self._stop_file_checked_at > _SECONDS_BETWEEN_STOP_FILE_CHECKS:
                self._stop_file_checked_at = now
                with suppress(OSError):  # of a network file system for a moment; the next check tries again
                    self._stop_file_found = (self._run.root / STOP).exists()
        return _STOP_FILE_FLAG if self._stop_file_found else self._run.signals.received or 0

    def save(self) -> None:
        """Save the state within an epoch."""
        self._save(is_best=False)

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch if it is due, the best epoch, the last epoch, or the run stops.

        Return the reason to stop, or None.
        """
        state = self._state
        is_best = self._update_best(evaluations)
        decision = self.sync_flags()
        self.stopped_early = state.epoch < self._schedule.epochs and self._should_stop_early()
        is_last = state.epoch == self._schedule.epochs or self.stopped_early
        self.heartbeat.extend_timeout()  # rank 0 may wait for the disk
        if decision.save or decision.stop or is_last or (is_best and self._retention.keep_best):
            self._save(is_best=is_best)
        elif is_best and self._run.is_writer and self._saver.wait():
            # The model alone: a run that resumes from an earlier checkpoint repeats this epoch and its model file.
            self._saver.save_model(state.state_dict(), self._logger.epochs[-1])
        return decision.stop

    def _update_best(self, evaluations: Evaluations) -> bool:
        state, evaluation = self._state, evaluations[self._early_stopping.selected_on]
        value, _ = evaluation.score(self._early_stopping.select_by)
        epoch = BestEpoch(epoch=state.epoch, step=state.step, value=value, loss=evaluation.loss)
        is_best = state.best is None or epoch.score > state.best.score
        if is_best:
            state.best = epoch
        return is_best

    def _should_stop_early(self) -> bool:
        """Return rank 0's decision, since only rank 0 has the metrics."""
        if self._early_stopping.patience is None:
            return False
        should_stop = self._early_stopping.should_stop(self._logger.epochs)
        return bool(self._run.ctx.all_reduce_max([should_stop])[0])

    def __enter__(self) -> Self:
        self._saver.begin_training(
            step=self._state.step,
            steps=self._schedule.total_steps,
            epoch=self._state.epoch,
            epochs=self._schedule.epochs,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for the writer thread. After the last epoch or a stop, raise its failure on all processes."""
        self.heartbeat.extend_timeout()
        try:
            if error is None or isinstance(error, Stopped):
                self._finish(stopped=error is not None)
        finally:
            self._saver.close()

    def _finish(self, *, stopped: bool) -> None:
        if self._run.is_writer:
            self._saver.wait()
        self.sync_flags()
        if stopped and self._stop_file_found and self._run.is_writer:
            with suppress(OSError):  # the next start reports it
                (self._run.root / STOP).unlink(missing_ok=True)  # so that the same command resumes the run

    def _save(self, *, is_best: bool) -> None:
        state = self._state
        checkpoint = CheckpointId(state.step, state.epoch)
        if checkpoint == self._last_saved:
            return
        self.heartbeat.extend_timeout()
        statistics = state.gather_batch_norm_statistics(self._run.ctx.world_size)
        self._last_saved, self._saved_at = checkpoint, time.monotonic()
        if not self._run.is_writer or not self._saver.wait():
            return  # all processes raise the saver's failure at the next `sync_flags`
        self._saver.save_checkpoint(
            state.state_dict(),
            statistics=statistics,
            metrics=self._logger.text,
            best_row=self._logger.epochs[-1] if is_best else None,
            is_end=self.stopped_early,
        )

    def repair_best_model(self) -> None:
        """Restore the run's model file if it is not of the checkpoint's best epoch. Call it before training.

        A start that was killed may have written the model of a later epoch. On another number of processes, that epoch
        may turn out worse when it is repeated. Every process must call this method.

        Raises:
            UserError: neither the file nor the best epoch's checkpoint exists, or the file could not be written.

        """
        ctx = self._run.ctx
        message = ctx.main_process_first(self._repair_best_model)
        self._state.best = ctx.broadcast(self._state.best)
        if message is not None:
            self._run.console.print(message)

    def _repair_best_model(self) -> str | None:
        best = self._state.best
        if not self._run.is_writer or best is None:
            return None
        try:
            return self._saver.repair_model(
                best, lambda: next(row for row in self._logger.epochs if row["step"] == best.step)
            )
        except CorruptCheckpoint:
            self._state.best = None
            return (
                f"{MODEL} is of an epoch whose checkpoint was lost, and the best epoch's checkpoint was not kept. "
                "From here on, the best epoch is selected anew"
            )
