"""What happens between two updates: all processes agree whether to save, to stop, or that one of them has failed.

The training step pays for that agreement (one small all-reduce on the CPU) and, if a checkpoint is due, for a copy
of the state. A thread of rank 0 writes the copy.
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
    """Rank 0's metrics of the run; empty on the other ranks."""

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
    """Saves checkpoints and the best model, and says when to stop: a context around the loop, on every process."""

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
            state: of training; its best epoch is kept up to date here.
            schedule: the updates of the run.
            saver: writes the files.
            retention: when a checkpoint is due.
            early_stopping: when to end the run before its last epoch.
            logger: holds the metrics that are saved with each checkpoint.

        """
        self._run, self._state, self._schedule, self._saver = run, state, schedule, saver
        self._retention, self._early_stopping, self._logger = retention, early_stopping, logger
        self.stopped_early = False
        """Whether early stopping has ended the run with the epoch that was completed last."""
        self.heartbeat = Heartbeat(step=state.step)
        """Ticks between updates, for the watchdog."""
        self._last_saved = CheckpointId(state.step, state.epoch) if state.step else None
        self._saved_at = time.monotonic()
        self._stop_file_checked_at = 0.0
        self._stop_file_found = False

    def sync_flags(self) -> StepDecision:
        """Return what all processes do after the update that was completed last.

        Raises:
            UserError: the error that one of them has met, on every process.

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
        """Return the number of the signal received, or that of the STOP file; 0 for none."""
        if self._run.is_writer and not self._stop_file_found:
            now = time.monotonic()
            if now - self._stop_file_checked_at > _SECONDS_BETWEEN_STOP_FILE_CHECKS:
                self._stop_file_checked_at = now
                with suppress(OSError):  # a network file system may fail for a moment; it is asked again
                    self._stop_file_found = (self._run.root / STOP).exists()
        return _STOP_FILE_FLAG if self._stop_file_found else self._run.signals.received or 0

    def save(self) -> None:
        """Save the state within an epoch."""
        self._save(is_best=False)

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch: if a checkpoint is due, it is the best or the last, or on a stop.

        Returns why to stop, or None.
        """
        state = self._state
        is_best = self._update_best(evaluations)
        decision = self.sync_flags()
        self.stopped_early = state.epoch < self._schedule.epochs and self._should_stop_early()
        is_last = state.epoch == self._schedule.epochs or self.stopped_early
        self.heartbeat.extend_timeout()  # for rank 0, which may wait for its disk
        if decision.save or decision.stop or is_last or (is_best and self._retention.keep_best):
            self._save(is_best=is_best)
        elif is_best and self._run.is_writer and self._saver.wait():
            # Without a checkpoint: a run that resumes from an earlier one comes to the same best epoch again.
            self._saver.save_model(state.state_dict(), self._logger.epochs[-1])
        return decision.stop

    def _update_best(self, evaluations: Evaluations) -> bool:
        state, evaluation = self._state, evaluations[self._early_stopping.selected_on]
        epoch = BestEpoch(
            epoch=state.epoch, step=state.step, accuracy=evaluation.accuracy, loss=evaluation.loss
        )
        is_best = state.best is None or epoch.score > state.best.score
        if is_best:
            state.best = epoch
        return is_best

    def _should_stop_early(self) -> bool:
        """Return rank 0's decision: only rank 0 has the metrics."""
        if self._early_stopping.patience is None:
            return False
        should_stop = self._early_stopping.should_stop(self._logger.epochs)
        return bool(self._run.ctx.all_reduce_max([should_stop])[0])

    def __enter__(self) -> Self:
        self._saver.save_position(
            step=self._state.step,
            steps=self._schedule.total_steps,
            epoch=self._state.epoch,
            epochs=self._schedule.epochs,
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written. After the last epoch or a stop, all processes learn whether it failed."""
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
            with suppress(OSError):  # the next start reports a file that cannot be removed
                (self._run.root / STOP).unlink(missing_ok=True)  # obeyed: the same command resumes the run

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
        """Make sure that the run's model file is that of the best epoch that the checkpoint knows; before training.

        On another number of processes, an epoch that was lost need not turn out as good again.

        Raises:
            UserError: neither the file nor that epoch's checkpoint exists, or the file could not be written.

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
                f"{MODEL} is of an epoch that was lost with an earlier start, and the best epoch's checkpoint was not "
                "kept: from here on, the best epoch is selected anew"
            )
