"""Between two updates: the processes agree whether to save, to stop, or that one of them has failed.

The training step pays for that agreement (one small exchange on the CPU) and, where a checkpoint is due, for a
copy of the state; a thread of rank 0 writes it.
"""

import dataclasses
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import torch
from safetensors.torch import save
from torch import nn

from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import should_stop_early
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import BestEpoch, CheckpointState, RunIdentity
from trainer.checkpoint.store import CheckpointId
from trainer.checkpoint.tensors import Tensors, load_tensors, snapshot, snapshot_ema
from trainer.checkpoint.writer import AsyncWriter
from trainer.data.loader import EpochOrder
from trainer.distributed.context import DistributedContext, main_process_first, raise_on_all_ranks
from trainer.distributed.signals import Stopped, StopSignals
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.loop import Evaluations, Progress, StepDecision
from trainer.metrics import MetricState
from trainer.model.batch_norm import gather_batch_norm_statistics
from trainer.model.file import ModelMetadata, read_metadata, write_model
from trainer.optim.ema import ModelEma
from trainer.report.metrics import epoch_rows
from trainer.run.folder import CHECKPOINTS, MODEL, STOP, saving_to
from trainer.run.lock import RunLock

_STOP_FILE = 1 << 10  # above every signal's number
_SECONDS_BETWEEN_LOOKS = 1.0


class Report(Protocol):
    """What rank 0 tells of the run; the others' tells nothing."""

    @property
    def failure(self) -> UserError | None:
        """Return why figures could not be written, if they could not."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """Return the rows of metrics.jsonl so far."""

    @property
    def text(self) -> str:
        """Return metrics.jsonl so far."""


@dataclass(kw_only=True)
class CheckpointManager:
    """Agrees, saves, and says when to stop: a context around the loop, on every process; rank 0's writes."""

    ctx: DistributedContext
    signals: StopSignals
    attempt: RunLock | None
    """Rank 0's right to write; None elsewhere."""
    folder: Path
    """Of this stage of the run."""
    model: nn.Module
    """Bare: neither DDP's wrapper nor its prefixes are written."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    order: EpochOrder
    epochs: int
    policy: RetentionPolicy
    run_metadata: Mapping[str, Any]
    """The fields of a state that do not change: schedule, chosen, threads, seed, versions."""
    lr_multiplier: Callable[[int], float]
    identity: RunIdentity
    description: ModelMetadata
    """Of the model; its metrics are filled in as they come."""
    selection: str | None
    """The part that the best epoch is selected on, where it is not `test`."""
    logger: Report
    best: BestEpoch | None
    last: CheckpointId | None
    """The newest checkpoint."""
    ema: ModelEma | None = None
    """The model's average, which is then what is evaluated and what the model file holds."""
    patience: int | None = None
    """Epochs without a better one on `selection` after which the run is over."""
    stopped_early: bool = False
    """Whether it is: the epoch that was kept last is the last one, although more were planned."""
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    """Counts the boundaries, for whoever watches over a hang."""
    _writer: AsyncWriter = field(default_factory=AsyncWriter)
    _saved_at: float = field(default_factory=time.monotonic)
    _looked_at: float = 0.0
    _stop_file: bool = False

    def sync_flags(self, step: int) -> StepDecision:
        """Return what all processes do after `step` updates of the run.

        Raises:
            UserError: one of them has met it; every process raises it.

        """
        failure = self._failure() if self.ctx.is_main_process else None
        due = self.ctx.is_main_process and self.policy.should_save(step, time.monotonic() - self._saved_at)
        stop, save, failed = self.ctx.all_reduce_max([self._asked(), due, failure is not None])
        self.heartbeat.tick(step)
        if failed:
            raise_on_all_ranks(self.ctx.accelerator, failure)
        reason = "the file STOP" if stop == _STOP_FILE else signal.Signals(stop).name if stop else None
        return StepDecision(save=bool(save), stop=reason)

    def _failure(self) -> UserError | None:
        return self._writer.failure or self.logger.failure

    def _asked(self) -> int:
        if self.attempt is not None and not self._stop_file:
            now = time.monotonic()
            if now - self._looked_at > _SECONDS_BETWEEN_LOOKS:
                self._looked_at = now
                with suppress(OSError):  # a network file system that stumbles is asked again in a second
                    self._stop_file = (self.attempt.folder / STOP).exists()
        return _STOP_FILE if self._stop_file else self.signals.asked or 0

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
        """Save the state within an epoch, after `epoch` whole ones and `step` updates in all."""
        self._save(CheckpointId(step, epoch), sums, with_model=False)

    def end_epoch(self, progress: Progress, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch if it is due, the best so far or the last; or if asked to stop."""
        found = evaluations[self.selection or "test"]
        now = BestEpoch(epoch=progress.epoch, step=progress.step, accuracy=found.accuracy, loss=found.loss)
        is_best = self.best is None or now.score > self.best.score
        if is_best:
            self.best = now
        wish = self.sync_flags(progress.step)
        self.stopped_early = progress.epoch < self.epochs and self._is_over()
        is_last = progress.epoch == self.epochs or self.stopped_early
        self.heartbeat.extend_timeout()  # for rank 0, which waits for its disk
        if wish.save or wish.stop or is_last or (is_best and self.policy.keep_best):
            self._save(CheckpointId(progress.step, progress.epoch), None, with_model=is_best)
        elif is_best and self.attempt is not None and self._writer.wait():
            # A run that goes on from an earlier checkpoint comes to the same best epoch again.
            model = self._captured()[self._evaluated]
            self._writer.submit(partial(self._write_model, self.attempt, model, self._described()))
        return wish.stop

    def _is_over(self) -> bool:
        """Return rank 0's word, which alone has the metrics, on whether training ends early."""
        if self.patience is None or self.selection is None:
            return False
        rows = epoch_rows(self.logger.rows) if self.ctx.is_main_process else []
        (over,) = self.ctx.all_reduce_max(
            [should_stop_early(rows, part=self.selection, patience=self.patience)]
        )
        return bool(over)

    @property
    def _evaluated(self) -> str:
        """Return which file of a checkpoint holds the weights that are evaluated."""
        return store.MODEL if self.ema is None else store.AVERAGE

    def _captured(self) -> dict[str, Tensors]:
        average = {} if self.ema is None else snapshot_ema(self.ema.model)
        return snapshot(self.model, self.optimizer) | average

    def __enter__(self) -> Self:
        if self.attempt is not None:
            steps = self.order.steps_per_epoch * self.epochs
            done = self.last or CheckpointId(0, 0)
            where = {"step": done.step, "steps": steps, "epoch": done.epoch, "epochs": self.epochs}
            self._writer.submit(partial(self.attempt.update, **where))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let what is being written come to its end; after the last epoch or a stop, all hear how it went."""
        self.heartbeat.extend_timeout()
        try:
            if error is None or isinstance(error, Stopped):
                self._finish(stopped=error is not None)
        finally:
            self._writer.close()

    def _finish(self, *, stopped: bool) -> None:
        if self.ctx.is_main_process:
            self._writer.wait()
        self.sync_flags(0)
        if stopped and self._stop_file and self.attempt is not None:
            with suppress(OSError):  # what cannot be removed, the next start says
                (self.attempt.folder / STOP).unlink(missing_ok=True)  # honoured: the same command goes on

    def _save(self, place: CheckpointId, sums: MetricState | None, *, with_model: bool) -> None:
        if place == self.last:
            return
        self.heartbeat.extend_timeout()
        both = self.model if self.ema is None else self.ema.and_model()
        statistics = gather_batch_norm_statistics(both, self.ctx.world_size)
        self.last, self._saved_at = place, time.monotonic()
        if self.attempt is None or not self._writer.wait():
            return  # a failure is raised by all at the next boundary
        tensors = self._captured()
        if statistics:
            tensors[store.STATISTICS] = statistics
        self._writer.submit(
            partial(
                self._write,
                self.attempt,
                self._state(place, sums),
                tensors=tensors,
                metrics=self.logger.text,
                description=self._described() if with_model else None,
                over=self.stopped_early,
            )
        )

    def _described(self, step: int | None = None) -> ModelMetadata:
        """Return the description of the epoch that ended with `step`; of the last one, if none is given."""
        rows = [row for row in self.logger.rows if row["kind"] == "epoch" and step in (None, row.get("step"))]
        metrics = {**rows[-1], "selected_on": self.selection or "test"}
        return dataclasses.replace(self.description, metrics=metrics)

    def repair_best_model(self, log: Callable[[str], object]) -> None:
        """See that the run's model file is of the best epoch that the checkpoint knows; before training.

        A start that was killed may have written a later epoch's, whose checkpoint never came to be. Made again on
        another number of processes, that epoch need not come out as good.

        Raises:
            UserError: there is neither the file nor that epoch's checkpoint, or it could not be written.

        """
        mended = main_process_first(self.ctx.accelerator, self._mend_model)
        self.best = self.ctx.broadcast(self.best)
        if mended is not None:
            log(mended)

    def _mend_model(self) -> str | None:
        if self.attempt is None or self.best is None or self._model_step() == self.best.step:
            return None
        place = CheckpointId(self.best.step, self.best.epoch)
        path = self.folder / CHECKPOINTS / place.name
        try:
            store.read(path)
        except store.CorruptCheckpoint:
            if not (self.folder / MODEL).exists():
                raise UserError(
                    f"{self.folder}: {MODEL} is gone, which holds the best epoch ({self.best.epoch}), and so is its "
                    "checkpoint. Restore that file, or --run.resume never, which moves the run aside"
                ) from None
            self.best = None
            return (
                f"{MODEL} is of an epoch that was lost with an earlier start, and the best one's checkpoint was not "
                "kept: from here on, the best epoch is sought anew"
            )
        self._write_model(self.attempt, load_tensors(path / self._evaluated), self._described(self.best.step))
        return f"{MODEL} was not of the best epoch ({self.best.epoch}): made anew from its checkpoint"

    def _model_step(self) -> int | None:
        """Return after which step the run's model file was written; None if it is not there, or none of a run."""
        try:
            description = read_metadata(self.folder / MODEL)
        except UserError:
            return None
        return description.metrics.get("step") if description else None

    def _state(self, place: CheckpointId, sums: MetricState | None) -> CheckpointState:
        assert self.attempt is not None  # for mypy: rank 0 alone asks
        return CheckpointState(
            epoch=place.epoch,
            step=place.step,
            sums=sums,
            best=self.best,
            subject=self.identity,
            order="",  # drawn in the writer's thread
            steps_per_epoch=self.order.steps_per_epoch,
            scaler=self.scaler.state_dict() if self.scaler is not None else {},
            world_size=self.ctx.world_size,
            attempt=self.attempt.record.attempt,
            **{
                **self.run_metadata,
                "schedule": {**self.run_metadata["schedule"], "lr_factor": self.lr_multiplier(place.step)},
            },
        )

    def _write(
        self,
        attempt: RunLock,
        state: CheckpointState,
        *,
        tensors: Mapping[str, Tensors],
        metrics: str,
        description: ModelMetadata | None,
        over: bool,
    ) -> None:
        """Write a checkpoint, the best epoch's model before it; in the writer's thread, on copies alone."""
        place = CheckpointId(state.step, state.epoch)
        state = dataclasses.replace(state, order=self.order.digest(state.epoch))
        for name in {store.MODEL, self._evaluated}:
            _require_finite(tensors[name], place)
        if description is not None:
            self._write_model(attempt, tensors[self._evaluated], description)
        folder = self.folder / CHECKPOINTS
        with saving_to(folder):
            files = {name: save(held) for name, held in tensors.items()}
            files |= {store.STATE: state.to_json(), store.METRICS: metrics.encode()}
            store.write(folder, place, files, check=attempt.check)
            whole = {"steps": place.step, "epochs": place.epoch} if over else {}
            attempt.update(step=place.step, epoch=place.epoch, **whole)
            best = CheckpointId(state.best.step, state.best.epoch) if state.best else None
            store.prune(
                folder, self.policy.to_keep(store.list_checkpoints(folder), best), check=attempt.check
            )

    def _write_model(self, attempt: RunLock, model: Tensors, description: ModelMetadata) -> None:
        with saving_to(self.folder / MODEL):
            attempt.check()
            write_model(self.folder / MODEL, model, description)


def _require_finite(model: Tensors, place: CheckpointId) -> None:
    spoilt = [name for name, tensor in model.items() if not torch.isfinite(tensor).all()]
    if spoilt:
        raise UserError(
            f"the update of step {place.step} has left values that are not finite in {spoilt[0]}: training has "
            "diverged. It was not saved; earlier checkpoints are as they were. Try a smaller optim.lr or "
            "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32"
        )
