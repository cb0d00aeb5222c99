"""The training loop: one function, from the state's position to the end of the last epoch."""

import math
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
    """The local batches of every update from the state's position on, over all epochs."""

    def __next__(self) -> LocalBatch:
        """Return this process's part of the next global batch, on its device."""

    def paths(self, epoch: int, step: int) -> Sequence[str]:
        """Return the files of a global batch, for an error; epoch and step of the epoch are counted from 0."""


class TrainLogger(Protocol):
    """What the loop reports. Metrics cover all processes and are known on every rank."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Report that an update was issued, without metrics: the device need not be waited for."""

    def log_step(self, progress: Progress) -> None:
        """Report the metrics within an epoch."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Report an epoch that has ended and was evaluated; called before anything is saved."""


class StepDecision(NamedTuple):
    """What all processes do between two updates."""

    save: bool
    stop: str | None
    """Why to stop (`SIGTERM`, `the file STOP`), or None."""


class Checkpoints(Protocol):
    """What happens between updates. Every process calls these methods at the same points."""

    @property
    def stopped_early(self) -> bool:
        """Return whether early stopping has ended the run with the epoch that was completed last."""

    def sync_flags(self) -> StepDecision:
        """Return what all processes do now; raise the error that one of them has met."""

    def save(self) -> None:
        """Save the state within an epoch."""

    def end_epoch(self, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch, if that is due; its row is in the metrics already.

        Returns why to stop, or None. The state is saved if there is a reason to stop.
        """


class NullCheckpoints:
    """Saves nothing and never stops: for running the loop alone."""

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
    start_epoch: Callable[[int], nn.Module],
    evaluate: Callable[[nn.Module, Callable[[], bool]], Evaluations],
    checkpoints: Checkpoints,
    logger: TrainLogger,
) -> None:
    """Train from the state's position to the end of the last epoch, or until early stopping ends the run.

    Args:
        state: updated in place.
        loader: starts at the state's position.
        schedule: the updates of the run.
        train_step: makes one update.
        start_epoch: epoch, from 0 -> the wrapped model to train, which is another wrapper where other parameters
            train from that epoch on.
        evaluate: (model, whether to stop early) -> the evaluation of each split; called at the end of each epoch.
        checkpoints: asked between updates whether to save or stop.
        logger: receives progress and metrics.

    Raises:
        UserError: the loss, or the model's output after an epoch, is not finite; or `checkpoints` has met an error.
        Stopped: the run was asked to stop; its state is saved.

    """
    ctx, steps = train_step.ctx, schedule.steps_per_epoch
    state.model.train()
    if state.step:
        set_lr(
            state.optimizer, schedule.lr_multiplier(state.step - 1)
        )  # logged if the epoch has no update left

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

    def save_and_stop(reason: str) -> NoReturn:
        save()
        raise Stopped(
            reason,
            saved=f"step {state.step} of {schedule.epochs * steps}, in epoch {state.epoch + 1} of {schedule.epochs}",
        )

    while state.epoch < schedule.epochs:
        resumed_at = state.step - state.epoch * steps
        # The last reference to the old wrapper must be gone before the new one is made, or DDP's hooks would stay.
        model = None
        model = start_epoch(state.epoch)
        meter = Meter(ctx.accelerator, state.metrics)
        for epoch_step in range(resumed_at, steps):
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
            if epoch_step + 1 < steps:  # after the last update, the epoch is evaluated first
                decision = checkpoints.sync_flags()
                if decision.stop:
                    save_and_stop(decision.stop)
                if decision.save:
                    save()
        epoch_progress = progress()
        examples = sum(schedule.batch_sizes)
        if epoch_progress.metrics.seen != examples:
            raise RuntimeError(f"trained on {epoch_progress.metrics.seen} examples, expected {examples}")
        if (
            resumed_at < steps
        ):  # otherwise they were averaged before they were saved; again would round them again
            average_batch_norm_statistics(state.ema.with_model(), ctx.world_size)
        try:
            evaluations = evaluate(state.ema.model, lambda: checkpoints.sync_flags().stop is not None)
        except Interrupted:
            save_and_stop(str(checkpoints.sync_flags().stop))
        if not all(math.isfinite(evaluation.loss_sum) for evaluation in evaluations.values()):
            raise _not_finite(state.step - 1, steps, loader)
        state.epoch, state.metrics = state.epoch + 1, None
        logger.log_epoch(epoch_progress, evaluations)
        stop = checkpoints.end_epoch(evaluations)
        if checkpoints.stopped_early:
            return
        if stop and state.epoch < schedule.epochs:
            raise Stopped(stop, saved=f"the end of epoch {state.epoch} of {schedule.epochs}")


def _not_finite(step: int, steps_per_epoch: int, loader: TrainLoader) -> UserError:
    epoch, epoch_step = divmod(step, steps_per_epoch)
    paths = loader.paths(epoch, epoch_step)
    listed = "".join(f"\n  {path}" for path in paths)
    return UserError(
        f"the loss is not finite since step {step + 1} (epoch {epoch + 1}, batch {epoch_step + 1}): training has "
        "diverged. Nothing of it was saved; earlier epochs are as they were. Try a smaller optim.lr or "
        "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32. "
        f"That batch's {len(paths)} examples:{listed}"
    )
