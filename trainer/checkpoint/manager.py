"""What happens between two updates: all processes agree whether to save, to stop, or that one of them has failed.

The training step pays for that agreement (one small all-reduce on the CPU) and, if a checkpoint is due, for a copy
of the state. A thread of rank 0 writes the copy.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from regraft.contract import CHECKPOINTS, MODEL, STOP, STOP_FILE
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import CheckpointState, RunMetadata
from trainer.checkpoint.store import CheckpointId
from trainer.checkpoint.writer import AsyncWriter
from trainer.distributed.signals import Stopped
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.evaluate import Evaluations
from trainer.loop import StepDecision
from trainer.model.file import ModelMetadata, read_metadata, write_model
from trainer.optim.schedule import TrainSchedule
from trainer.report.metrics import epoch_rows
from trainer.run.folder import saving_to
from trainer.run.session import OpenRun
from trainer.state import BestEpoch, Tensors, TrainState

_STOP_FILE_FLAG = 1 << 10  # above the number of every signal
_SECONDS_BETWEEN_STOP_FILE_CHECKS = 1.0


class MetricsLog(Protocol):
    """Rank 0's metrics of the run; empty on the other ranks."""

    @property
    def failure(self) -> UserError | None:
        """Return why metrics could not be written, or None."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl so far."""

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
        retention: RetentionPolicy,
        early_stopping: EarlyStopping,
        metadata: RunMetadata,
        model_metadata: ModelMetadata,
        order_digest: Callable[[int], str],
        logger: MetricsLog,
    ) -> None:
        """Start from the state's position.

        Args:
            run: the open run folder.
            state: of training; its best epoch is kept up to date here.
            schedule: the updates of the run.
            retention: when to save, and which checkpoints to keep.
            early_stopping: when to end the run before its last epoch.
            metadata: what every checkpoint says about the run.
            model_metadata: header of the model file; its metrics are filled in when it is written.
            order_digest: epoch, from 0 -> SHA-256 of the order of its examples.
            logger: holds the metrics that are saved with each checkpoint.

        """
        self._run, self._state, self._schedule = run, state, schedule
        self._retention, self._early_stopping = retention, early_stopping
        self._metadata, self._model_metadata, self._order_digest = metadata, model_metadata, order_digest
        self._logger = logger
        self.stopped_early = False
        """Whether early stopping has ended the run with the epoch that was completed last."""
        self.heartbeat = Heartbeat(step=state.step)
        """Ticks between updates, for the watchdog."""
        self._last_saved = CheckpointId(state.step, state.epoch) if state.step else None
        self._writer = AsyncWriter()
        self._saved_at = time.monotonic()
        self._stop_file_checked_at = 0.0
        self._stop_file_found = False

    def sync_flags(self) -> StepDecision:
        """Return what all processes do after the update that was completed last.

        Raises:
            UserError: the error that one of them has met, on every process.

        """
        ctx = self._run.ctx
        failure = (self._writer.failure or self._logger.failure) if ctx.is_main_process else None
        due = ctx.is_main_process and self._retention.should_save(
            self._state.step, time.monotonic() - self._saved_at
        )
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
        self._save(with_model=False)

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
            self._save(with_model=is_best)
        elif is_best and self._run.is_writer and self._writer.wait():
            # Without a checkpoint: a run that resumes from an earlier one comes to the same best epoch again.
            model = state.state_dict()[self._evaluated]
            self._writer.submit(partial(self._write_model, model, self._metadata_of_epoch()))
        return decision.stop

    def _update_best(self, evaluations: Evaluations) -> bool:
        state = self._state
        evaluation = evaluations[self._early_stopping.split or "test"]
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
        rows = epoch_rows(self._logger.rows) if self._run.ctx.is_main_process else []
        return bool(self._run.ctx.all_reduce_max([self._early_stopping.should_stop(rows)])[0])

    @property
    def _evaluated(self) -> str:
        """Return the key of the weights that are evaluated, in a state dict."""
        return "ema" if self._state.ema.enabled else "model"

    def __enter__(self) -> Self:
        if self._run.lock is not None:
            position = {
                "step": self._state.step,
                "steps": self._schedule.total_steps,
                "epoch": self._state.epoch,
                "epochs": self._schedule.epochs,
            }
            self._writer.submit(partial(self._run.lock.update, **position))
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
            self._writer.close()

    def _finish(self, *, stopped: bool) -> None:
        if self._run.ctx.is_main_process:
            self._writer.wait()
        self.sync_flags()
        if stopped and self._stop_file_found and self._run.is_writer:
            with suppress(OSError):  # the next start reports a file that cannot be removed
                (self._run.root / STOP).unlink(missing_ok=True)  # obeyed: the same command resumes the run

    def _save(self, *, with_model: bool) -> None:
        state = self._state
        checkpoint = CheckpointId(state.step, state.epoch)
        if checkpoint == self._last_saved:
            return
        self.heartbeat.extend_timeout()
        statistics = state.gather_batch_norm_statistics(self._run.ctx.world_size)
        self._last_saved, self._saved_at = checkpoint, time.monotonic()
        if not self._run.is_writer or not self._writer.wait():
            return  # all processes raise the writer's failure at the next `sync_flags`
        saved = state.state_dict()
        self._writer.submit(
            partial(
                self._write,
                saved,
                statistics=statistics,
                metrics=self._logger.text,
                model_metadata=self._metadata_of_epoch() if with_model else None,
                is_end=self.stopped_early,
            )
        )

    def _metadata_of_epoch(self, step: int | None = None) -> ModelMetadata:
        """Return the model file's header for the epoch that ended with `step`, by default the last one."""
        rows = [
            row for row in self._logger.rows if row["kind"] == "epoch" and step in (None, row.get("step"))
        ]
        metrics = {**rows[-1], "selected_on": self._early_stopping.split or "test"}
        return dataclasses.replace(self._model_metadata, metrics=metrics)

    def repair_best_model(self) -> None:
        """Make sure that the run's model file is that of the best epoch that the checkpoint knows; before training.

        A start that was killed may have written the model of a later epoch whose checkpoint was never finished. On
        another number of processes, that epoch need not turn out as good again.

        Raises:
            UserError: neither the file nor that epoch's checkpoint exists, or the file could not be written.

        """
        ctx = self._run.ctx
        message = ctx.main_process_first(self._repair_best_model)
        self._state.best = ctx.broadcast(self._state.best)
        if message is not None:
            self._run.console.print(message)

    def _repair_best_model(self) -> str | None:
        best, folder = self._state.best, self._run.folder
        if not self._run.is_writer or best is None or self._model_step() == best.step:
            return None
        path = folder / CHECKPOINTS / CheckpointId(best.step, best.epoch).name
        try:
            checkpoint = store.read(path)
        except store.CorruptCheckpoint:
            if not (folder / MODEL).exists():
                raise UserError(
                    f"{folder}: {MODEL} is gone, which holds the best epoch ({best.epoch}), and so is its checkpoint. "
                    "Restore that file, or --run.resume never, which archives the run"
                ) from None
            self._state.best = None
            return (
                f"{MODEL} is of an epoch that was lost with an earlier start, and the best epoch's checkpoint was not "
                "kept: from here on, the best epoch is selected anew"
            )
        weights = checkpoint.state_dict()[self._evaluated]
        self._write_model(weights, self._metadata_of_epoch(best.step))
        return f"{MODEL} was not of the best epoch ({best.epoch}): restored from its checkpoint"

    def _model_step(self) -> int | None:
        """Return the step after which the run's model file was written; None if there is no such file."""
        try:
            metadata = read_metadata(self._run.folder / MODEL)
        except UserError:
            return None
        return metadata.metrics.get("step") if metadata else None

    def _write(
        self,
        saved: Mapping[str, Any],
        *,
        statistics: Tensors,
        metrics: str,
        model_metadata: ModelMetadata | None,
        is_end: bool,
    ) -> None:
        """Write a checkpoint, and before it the model of the best epoch; in the writer's thread, from copies alone."""
        checkpoint = CheckpointId(saved["step"], saved["epoch"])
        for key in {"model", self._evaluated}:
            _require_finite(saved[key], checkpoint)
        if model_metadata is not None:
            self._write_model(saved[self._evaluated], model_metadata)
        state = CheckpointState(
            **{key: saved[key] for key in ("epoch", "step", "metrics", "best", "scaler")},
            order_digest=self._order_digest(saved["epoch"]),
            run=self._metadata,
        )
        folder, lock = self._run.folder / CHECKPOINTS, self._run.lock
        assert lock is not None  # for mypy: rank 0 alone writes
        with saving_to(folder):
            store.write(
                folder,
                checkpoint,
                store.to_files(saved, statistics)
                | {store.STATE: state.to_json(), store.METRICS: metrics.encode()},
                check=lock.check,
            )
            end = {"steps": checkpoint.step, "epochs": checkpoint.epoch} if is_end else {}
            lock.update(step=checkpoint.step, epoch=checkpoint.epoch, **end)
            best = CheckpointId(state.best.step, state.best.epoch) if state.best else None
            kept = self._retention.to_keep(store.list_checkpoints(folder), best)
            store.prune(folder, kept, check=lock.check)

    def _write_model(self, weights: Tensors, metadata: ModelMetadata) -> None:
        path = self._run.folder / MODEL
        with saving_to(path):
            self._run.check_lock()
            write_model(path, weights, metadata)


def _require_finite(weights: Tensors, checkpoint: CheckpointId) -> None:
    wrong = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if wrong:
        raise UserError(
            f"the update of step {checkpoint.step} has left values that are not finite in {wrong[0]}: training has "
            "diverged. It was not saved; earlier checkpoints are as they were. Try a smaller optim.lr or "
            "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32"
        )
