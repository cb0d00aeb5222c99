"""The training loop."""

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn, Protocol

from torch import nn

from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluations, Interrupted
from trainer.metrics import Meter, Progress
from trainer.model.batch_norm import average_batch_norm_statistics
from trainer.optim.param_groups import current_lr, set_lr
from trainer.optim.schedule import TrainSchedule
from trainer.optim.train_step import LocalBatch, TrainStep
from trainer.state import TrainState


class TrainLoader(Protocol):
    """Yields the local batches of all remaining updates of the run."""

    def __next__(self) -> LocalBatch:
        """Return the local batch of the next update, on the device of this process."""

    def paths(self, epoch: int, step: int) -> Sequence[str]:
        """Return the image files of a global batch, for an error message. Epoch and step count from 0."""


class TrainLogger(Protocol):
    """Receives progress and metrics. Metrics are those of all processes, and the same on every rank."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Report an update without its metrics, so that the loop does not wait for the device."""

    def log_step(self, progress: Progress) -> None:
        """Report the metrics within an epoch."""

    def draw_curves(self) -> None:
        """Draw the metrics so far."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations, evaluation_seconds: float) -> None:
        """Report the metrics and evaluations of an epoch, before its checkpoint is saved."""


class StepDecision(NamedTuple):
    """What all processes do between two updates."""

    save: bool
    stop: str | None
    """Reason to stop (`SIGTERM`, `the file STOP`), or None."""


class Checkpoints(Protocol):
    """Saves checkpoints and decides when to stop. Every process must call each method at the same step."""

    @property
    def stopped_early(self) -> bool:
        """Return whether early stopping ends the run after the last completed epoch."""

    def sync_flags(self) -> StepDecision:
        """Return the decision of all processes; raise an error that one of them has met."""

    def save(self) -> None:
        """Save the state within an epoch."""

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch if a checkpoint is due or there is a reason to stop.

        Returns the reason to stop, or None. The logger has already logged the epoch.
        """


class NullCheckpoints:
    """Saves nothing and never stops; for a loop without a run folder."""

    stopped_early = False

    def sync_flags(self) -> StepDecision:
        """Continue."""
        return StepDecision(save=False, stop=None)

    def save(self) -> None:
        """Save nothing."""

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        """Save nothing."""
        return None


def fit(  # noqa: PLR0912, PLR0915 (one function that reads from top to bottom)
    state: TrainState,
    loader: TrainLoader,
    schedule: TrainSchedule,
    train_step: TrainStep,
    *,
    start_epoch: Callable[[int, Callable[[], bool]], nn.Module],
    evaluate: Callable[[nn.Module, Callable[[], bool]], Evaluations],
    checkpoints: Checkpoints,
    logger: TrainLogger,
) -> None:
    """Train from the state's position to the last epoch, or until early stopping ends the run.

    Args:
        state: updated in place.
        loader: starts at the state's position.
        schedule: the updates of the run.
        train_step: makes one update.
        start_epoch: (epoch from 0, interrupted) -> what trains, wrapped. The wrapper changes when other parameters
            start to train.
        evaluate: (model, interrupted) -> the evaluation of each split; called at the end of each epoch.
        checkpoints: saves the state, and decides between two updates whether to save or stop.
        logger: receives progress and metrics.

    Raises:
        UserError: the training loss or an evaluation is not finite, or `checkpoints` has met an error.
        Stopped: the run was asked to stop, and its state is saved.

    """
    ctx, steps = train_step.ctx, schedule.steps_per_epoch
    state.model.train()
    if state.step:  # the learning rate is logged even if the epoch has no update left
        set_lr(state.optimizer, schedule.lr_multiplier(state.step - 1))

    def progress() -> Progress:
        metrics = meter.compute()
        if metrics.first_nonfinite_step is not None:
            raise _not_finite(metrics.first_nonfinite_step, steps, loader)
        return Progress(
            epoch=state.epoch + 1,
            epoch_step=state.step - state.epoch * steps,
            step=state.step,
            metrics=metrics,
            lr=current_lr(state.optimizer),
        )

    def save() -> None:
        state.metrics, nonfinite_step = meter.state()
        if nonfinite_step is not None:
            raise _not_finite(nonfinite_step, steps, loader)
        checkpoints.save()

    def interrupted() -> bool:
        return checkpoints.sync_flags().stop is not None

    def stop_run(reason: str) -> NoReturn:
        raise Stopped(
            reason,
            saved=f"step {state.step} of {schedule.epochs * steps}, in epoch {state.epoch + 1} of {schedule.epochs}",
        )

    def save_and_stop(reason: str) -> NoReturn:
        save()
        stop_run(reason)

    while state.epoch < schedule.epochs:
        start_step = state.step - state.epoch * steps
        # The old wrapper must be freed before the new one is made, or its DDP hooks stay registered.
        model = None
        try:
            model = start_epoch(state.epoch, interrupted)
        except Interrupted:
            checkpoints.save()
            stop_run(str(checkpoints.sync_flags().stop))
        meter = Meter(ctx.accelerator, state.metrics)
        for epoch_step in range(start_step, steps):
            step, size = state.step, schedule.batch_sizes[epoch_step]
            batch = next(loader)
            meter.start_step()
            set_lr(state.optimizer, schedule.lr_multiplier(step))
            loss_sum, correct = train_step(model, state.optimizer, batch, step, size)
            state.step = step + 1
            state.ema.update(state.step)
            meter.end_step(step, len(batch[1]), loss_sum, correct)
            logger.log_progress(state.epoch + 1, epoch_step + 1)
            if epoch_step + 1 in schedule.log_steps:
                logger.log_step(progress())
            if epoch_step + 1 < steps:  # after the last update, `evaluate` syncs the flags
                decision = checkpoints.sync_flags()
                if decision.stop:
                    save_and_stop(decision.stop)
                if decision.save:
                    save()
        epoch_progress = progress()
        examples = sum(schedule.batch_sizes)
        if epoch_progress.metrics.seen != examples:
            raise RuntimeError(f"trained on {epoch_progress.metrics.seen} examples, expected {examples}")
        if start_step < steps:  # otherwise they were averaged before the save; again would round them again
            average_batch_norm_statistics(state.ema.with_model(), ctx.world_size)
        evaluation_began = time.perf_counter()
        try:
            evaluations = evaluate(state.ema.model, interrupted)
        except Interrupted:
            save_and_stop(str(checkpoints.sync_flags().stop))
        evaluation_seconds = time.perf_counter() - evaluation_began  # the metrics have been read from the device
        if not all(math.isfinite(evaluation.loss_sum) for evaluation in evaluations.values()):
            raise _not_finite(state.step - 1, steps, loader)
        state.epoch, state.metrics = state.epoch + 1, None
        logger.log_epoch(epoch_progress, evaluations, evaluation_seconds)
        stop = checkpoints.end_epoch(evaluations)
        if checkpoints.stopped_early or state.epoch == schedule.epochs:
            return  # closing the logger draws the last curves
        if stop:
            raise Stopped(stop, saved=f"the end of epoch {state.epoch} of {schedule.epochs}")
        logger.draw_curves()  # after the save: nothing that only shows may prevent it


def _not_finite(step: int, steps_per_epoch: int, loader: TrainLoader) -> UserError:
    epoch, epoch_step = divmod(step, steps_per_epoch)
    paths = loader.paths(epoch, epoch_step)
    lines = "".join(f"\n  {path}" for path in paths)
    return UserError(
        f"the loss is not finite since step {step + 1} (epoch {epoch + 1}, batch {epoch_step + 1}): training has "
        "diverged. Nothing was saved since then; earlier checkpoints are unchanged. Try a smaller optim.lr or "
        "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32. "
        f"That batch's {len(paths)} examples:{lines}"
    )
