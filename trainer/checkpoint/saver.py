"""Write checkpoints and the best model from copies of the state, in a thread of rank 0."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from regraft.contract import CHECKPOINTS, MODEL
from trainer.checkpoint import store
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import CheckpointId, CheckpointState, RunMetadata
from trainer.checkpoint.store import Tensors
from trainer.checkpoint.writer import AsyncWriter
from trainer.errors import UserError
from trainer.metrics import BestEpoch
from trainer.model.metadata import ModelMetadata, read_metadata, write_model
from trainer.report.metrics import Row
from trainer.run.folder import remove_evaluation, saving_to
from trainer.run.session import OpenRun


class CheckpointSaver:
    """Writes checkpoints and model files in a background thread. Only rank 0's writes."""

    def __init__(
        self,
        run: OpenRun,
        *,
        retention: RetentionPolicy,
        metadata: RunMetadata,
        model_metadata: ModelMetadata,
        selected_on: str,
        order_digest: Callable[[int], str],
    ) -> None:
        """Start the writer thread.

        Args:
            run: the open run folder.
            retention: which checkpoints to keep.
            metadata: what every checkpoint says about the run.
            model_metadata: header of the model file. The metrics are replaced in each file.
            selected_on: split that the best epoch is selected on.
            order_digest: epoch, from 0 -> SHA-256 of the order of its examples.

        """
        self._run, self._retention = run, retention
        self._metadata, self._model_metadata, self._order_digest = metadata, model_metadata, order_digest
        self._selected_on = selected_on
        self._writer = AsyncWriter()

    @property
    def failure(self) -> UserError | None:
        """Return the error of a failed write, or None."""
        return self._writer.failure

    def wait(self) -> bool:
        """Wait for the write in progress; return whether it succeeded."""
        return self._writer.wait()

    def close(self) -> None:
        """Finish the write in progress, and end the thread."""
        self._writer.close()

    def begin_training(self, **position: int) -> None:
        """Record the run's position in the attempt's file."""
        if self._run.lock is not None:
            self._writer.submit(partial(self._run.lock.begin_training, **position))

    def save_checkpoint(
        self, saved: Mapping[str, Any], *, statistics: Tensors, metrics: str, best_row: Row | None, is_end: bool
    ) -> None:
        """Write a checkpoint, and before it the model file if the checkpoint is of the best epoch.

        Args:
            saved: a state dict that nothing changes any more.
            statistics: BatchNorm statistics of each process.
            metrics: text of metrics.jsonl.
            best_row: the epoch's row of metrics.jsonl, if it is the best epoch; else None.
            is_end: whether early stopping has ended the run with this checkpoint.

        """
        job = partial(
            self._write_checkpoint, saved, statistics=statistics, metrics=metrics, best_row=best_row, is_end=is_end
        )
        self._writer.submit(job)

    def save_model(self, saved: Mapping[str, Any], row: Row) -> None:
        """Write the model file of the best epoch without a checkpoint."""
        self._writer.submit(partial(self._write_model, evaluated_weights(saved), row))

    def repair_model(self, best: BestEpoch, row: Callable[[], Row]) -> str | None:
        """Rewrite the run's model file unless it is of the best epoch. Return a line to print, or None.

        A start that was killed may have written the model of a later epoch, whose checkpoint was never completed.

        Args:
            best: the best epoch of the checkpoint that the run resumes from.
            row: returns that epoch's row of metrics.jsonl.

        Raises:
            store.CorruptCheckpoint: the file is of another epoch, and the best epoch's checkpoint is not there.
            UserError: neither the file nor that checkpoint is there, or the file could not be written.

        """
        folder = self._run.folder
        if self._model_step() == best.step:
            return None
        path = folder / CHECKPOINTS / CheckpointId(best.step, best.epoch).name
        try:
            checkpoint = store.read(path)
        except store.CorruptCheckpoint:
            if not (folder / MODEL).exists():
                raise UserError(
                    f"{folder}: {MODEL} of the best epoch ({best.epoch}) is gone, and so is that epoch's checkpoint. "
                    "Restore the file, or --run.resume never, which archives the run"
                ) from None
            raise
        self._write_model(evaluated_weights(checkpoint.state_dict()), row())
        return f"{MODEL} was not of the best epoch ({best.epoch}): restored from its checkpoint"

    def _model_step(self) -> int | None:
        """Return the step of the run's model file; None if there is no valid file."""
        try:
            metadata = read_metadata(self._run.folder / MODEL)
        except UserError:
            return None
        return metadata.metrics.get("step") if metadata else None

    def _write_checkpoint(
        self, saved: Mapping[str, Any], *, statistics: Tensors, metrics: str, best_row: Row | None, is_end: bool
    ) -> None:
        checkpoint = CheckpointId(saved["step"], saved["epoch"])
        for weights in (saved["model"], evaluated_weights(saved)):
            _require_finite(weights, checkpoint)
        if best_row is not None:
            self._write_model(evaluated_weights(saved), best_row)
        state = CheckpointState(
            **{key: saved[key] for key in ("epoch", "step", "metrics", "best", "scaler")},
            order_digest=self._order_digest(saved["epoch"]),
            run=self._metadata,
        )
        files = store.to_files(saved, statistics)
        files |= {store.STATE: state.to_json(), store.METRICS: metrics.encode()}
        folder, lock = self._run.folder / CHECKPOINTS, self._run.lock
        assert lock is not None  # for mypy: rank 0 alone writes
        with saving_to(folder):
            store.write(folder, checkpoint, files, check=lock.check)
            end = {"steps": checkpoint.step, "epochs": checkpoint.epoch} if is_end else {}
            lock.update(step=checkpoint.step, epoch=checkpoint.epoch, **end)
            best = CheckpointId(state.best.step, state.best.epoch) if state.best else None
            kept = self._retention.to_keep(store.list_checkpoints(folder), best)
            store.prune(folder, kept, check=lock.check)

    def _write_model(self, weights: Tensors, row: Row) -> None:
        path = self._run.folder / MODEL
        metrics = {**row, "selected_on": self._selected_on}
        with saving_to(path):
            self._run.check_lock()
            remove_evaluation(path.parent)
            write_model(path, weights, dataclasses.replace(self._model_metadata, metrics=metrics))


def evaluated_weights(saved: Mapping[str, Any]) -> Tensors:
    """Return the weights of a state dict that are evaluated: the moving average, if there is one."""
    weights: Tensors = saved["ema"] or saved["model"]
    return weights


def _require_finite(weights: Tensors, checkpoint: CheckpointId) -> None:
    nonfinite = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if nonfinite:
        raise UserError(
            f"the update of step {checkpoint.step} has left values that are not finite in {nonfinite[0]}: training has "
            "diverged. This state was not saved; earlier checkpoints are unchanged. Try a smaller optim.lr or "
            "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32"
        )
