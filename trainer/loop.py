"""Training: one function that reads from top to bottom, and the update it is made of."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, NoReturn, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluation, Interrupted
from trainer.metrics import Meter, Metrics, MetricState
from trainer.model.batch_norm import average_batch_norm_statistics, batch_norm_in_eval
from trainer.model.head import split_outputs
from trainer.optim.ema import ModelEma
from trainer.optim.loss import PLAIN, Criterion, MixedTarget
from trainer.optim.mixup import Mixup
from trainer.optim.param_groups import current_lr, set_lr
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import L2SP

Share = tuple[Tensor, Tensor, Tensor]
"""One process's part of a global batch: images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]."""
Normalize = Callable[[Tensor], Tensor]
"""Images [B, 3, H, W], uint8 or (mixed) float from 0 to 255 -> the model's input."""
Evaluations = dict[str, Evaluation]
"""Part of the data (`test`, `val`) -> what a pass over it found."""


@dataclass(frozen=True, kw_only=True)
class TrainSchedule:
    """Which updates are made."""

    batch_sizes: tuple[int, ...]
    """Examples of each global batch of an epoch, in order; there are as many as an epoch has steps."""
    epochs: int
    loss_reduction: Literal["mean", "sum"]
    grad_accum_steps: int
    max_grad_norm: float | None
    seed: int
    logs_per_epoch: int
    lr_multiplier: Callable[[int], float]
    """Step of the run, counted from 0 -> share of the peak learning rate."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of updates of an epoch."""
        return len(self.batch_sizes)

    @property
    def log_steps(self) -> frozenset[int]:
        """Return the steps of an epoch, counted from 1, after which figures are read; the last is one of them."""
        wanted = min(self.logs_per_epoch, self.steps_per_epoch)
        return frozenset(math.ceil(i * self.steps_per_epoch / wanted) for i in range(1, wanted + 1))


@dataclass(frozen=True, kw_only=True)
class ResumePoint:
    """Where training begins: a new run, or where an earlier start of it came to."""

    epoch: int = 0
    """Whole epochs made: trained and evaluated."""
    step: int = 0
    """Updates made; those beyond `epoch` whole epochs belong to the epoch in progress."""
    sums: MetricState | None = None
    """Of the epoch in progress."""


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands, and the figures of its epoch so far."""

    epoch: int
    """Counted from 1."""
    epoch_step: int
    """Updates made in the epoch."""
    step: int
    """Updates made in the run."""
    metrics: Metrics
    lr: dict[str, float]
    """Parameter group -> learning rate of the last update."""


class TrainLogger(Protocol):
    """What the loop tells of itself. Figures are over all processes, and known to every rank."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Hear that an update was issued: without figures, so that the device need not be waited for."""

    def log_step(self, progress: Progress) -> None:
        """Hear the figures read within an epoch."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Hear that an epoch has ended and was evaluated; called before anything is saved."""


class StepDecision(NamedTuple):
    """What the processes have agreed on at a boundary between two updates."""

    save: bool
    stop: str | None
    """Who asks to stop (`SIGTERM`, `the file STOP`), or None."""


class CheckpointManager(Protocol):
    """What happens between updates. All processes call it at the same boundaries."""

    @property
    def stopped_early(self) -> bool:
        """Return whether the epoch that was kept last is the run's last one, although more were planned."""

    def sync_flags(self, step: int) -> StepDecision:
        """Return what all of them do after `step` updates of the run; raises what one of them has met."""

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
        """Save the state within an epoch: after `epoch` whole ones and `step` updates in all."""

    def end_epoch(self, progress: Progress, evaluations: Evaluations) -> str | None:
        """Save the state at the end of an epoch, if that is due; its row stands in the metrics already.

        Returns who asks to stop, if anybody does; the state is then saved.
        """


class NullCheckpointManager:
    """Saves nothing and never stops: for a look at the loop alone."""

    stopped_early = False

    def sync_flags(self, step: int) -> StepDecision:
        """Go on."""
        return StepDecision(save=False, stop=None)

    def save(self, epoch: int, step: int, sums: MetricState) -> None:
        """Save nothing."""

    def end_epoch(self, progress: Progress, evaluations: Evaluations) -> str | None:
        """Save nothing."""
        return None


def fit(  # noqa: PLR0912, PLR0915 (that it reads from top to bottom is worth its length)
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Share],
    plan: TrainSchedule,
    start: ResumePoint,
    *,
    accelerator: Accelerator,
    normalize: Normalize,
    evaluate: Callable[[nn.Module, Callable[[], bool]], Evaluations],
    keeper: CheckpointManager,
    listener: TrainLogger,
    batch_paths: Callable[[int, int], Sequence[str]],
    begin_epoch: Callable[[int], nn.Module] | None = None,
    criterion: Criterion = PLAIN,
    mixup: Mixup | None = None,
    ema: ModelEma | None = None,
    l2_sp: L2SP | None = None,
) -> None:
    """Train from `start` to the end of the last epoch, or of that with which the keeper says that it is over.

    Args:
        model: wrapped by accelerate.
        optimizer: prepared by accelerate; its groups carry `peak_lr`.
        batches: this process's share of every update to be made, over all epochs.
        plan: which updates are made.
        start: where model and optimizer stand.
        accelerator: of the process group.
        normalise: from stored pictures to the model's input.
        evaluate: the bare model, and whether to end early -> what each evaluated part found; called at the end
            of each epoch.
        keeper: asked at the boundaries between updates what to do; saves, once losses are known to be finite.
        listener: hears of progress, and of figures where they are read.
        paths_of: (epoch, step of the epoch), both from 0 -> the files of that global batch.
        begin_epoch: epoch, from 0 -> the model to go on with, wrapped anew where other parameters train from there on;
            None: it stays what it is.
        objective: the loss.
        mixing: what mixes the pictures of a global batch with one another; None: nothing does.
        shadow: the model's average, which is evaluated in its place.
        pull: towards the source's weights, at every update.

    Raises:
        UserError: the loss, or the model's output after an epoch, is not finite; or what the keeper has met.
        Stopped: the keeper was asked to stop; the state is saved.

    """
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    points, steps = plan.log_steps, plan.steps_per_epoch

    def progress(epoch: int, epoch_step: int) -> Progress:
        """Read the figures after `epoch_step` updates of an epoch counted from 0."""
        figures = meter.compute()
        if figures.first_nonfinite_step is not None:
            raise _not_finite(figures.first_nonfinite_step, plan, batch_paths)
        return Progress(
            epoch=epoch + 1,
            epoch_step=epoch_step,
            step=epoch * steps + epoch_step,
            metrics=figures,
            lr=current_lr(optimizer),
        )

    def leave(reason: str, epoch: int, step: int) -> NoReturn:
        """Save within epoch `epoch` (whole epochs before it), and stop."""
        save(epoch, step)
        raise Stopped(
            reason, saved=f"step {step} of {plan.epochs * steps}, in epoch {epoch + 1} of {plan.epochs}"
        )

    def save(epoch: int, step: int) -> None:
        sums, first_nonfinite_step = meter.state()
        if first_nonfinite_step is not None:
            raise _not_finite(first_nonfinite_step, plan, batch_paths)
        keeper.save(epoch, step, sums)

    model.train()
    if start.step:
        set_lr(
            optimizer, plan.lr_multiplier(start.step - 1)
        )  # which is told of an epoch with no update to come
    for epoch in range(start.epoch, plan.epochs):
        begun = start.step - epoch * steps if epoch == start.epoch else 0
        if begin_epoch is not None:
            del model  # or what DDP has hooked into it would outlive it
            model = begin_epoch(epoch)
        meter = Meter(accelerator, start.sums if begun else None)
        for epoch_step in range(begun, steps):
            step, size = epoch * steps + epoch_step, plan.batch_sizes[epoch_step]
            images, labels, examples = next(batches)
            meter.start_step()
            blend = None
            if mixup is not None:
                images, labels, blend = mixup(images, labels, step, size)
            set_lr(optimizer, plan.lr_multiplier(step))
            # The masks of dropout and stochastic depth belong to (seed, step, rank), not to what ran before.
            torch.manual_seed(derive_seed("masks", plan.seed, step, rank))
            # DDP averages the gradients over the ranks: times world, that is their sum.
            scale = world_size / size if plan.loss_reduction == "mean" else float(world_size)
            loss_sum, correct = update(
                model,
                optimizer,
                (images, labels, examples),
                scale,
                accelerator=accelerator,
                normalize=normalize,
                parts=plan.grad_accum_steps,
                max_grad_norm=plan.max_grad_norm,
                criterion=criterion,
                blend=blend,
                l2_sp=l2_sp,
            )
            if ema is not None:
                ema.update(step + 1)
            meter.end_step(step, len(labels), loss_sum, correct)
            listener.log_progress(epoch + 1, epoch_step + 1)
            if epoch_step + 1 in points:
                listener.log_step(progress(epoch, epoch_step + 1))
            if epoch_step + 1 < steps:  # the last update's boundary lies behind the evaluation
                wish = keeper.sync_flags(step + 1)
                if wish.stop:
                    leave(wish.stop, epoch, step + 1)
                if wish.save:
                    save(epoch, step + 1)
        done = (epoch + 1) * steps
        whole = progress(epoch, steps)
        if whole.metrics.seen != sum(plan.batch_sizes):
            raise RuntimeError(f"trained on {whole.metrics.seen} examples, expected {sum(plan.batch_sizes)}")
        if begun < steps:  # else they were averaged before it was saved, and would be rounded anew
            average_batch_norm_statistics(bare if ema is None else ema.and_model(), world_size)
        evaluated = bare if ema is None else ema.model
        try:
            evaluations = evaluate(evaluated, lambda: keeper.sync_flags(done).stop is not None)  # noqa: B023 (called within the round)
        except Interrupted:
            leave(str(keeper.sync_flags(done).stop), epoch, done)
        if not all(math.isfinite(e.loss_sum) for e in evaluations.values()):
            raise _not_finite(done - 1, plan, batch_paths)
        listener.log_epoch(whole, evaluations)
        stop = keeper.end_epoch(whole, evaluations)
        if keeper.stopped_early:
            return
        if stop and epoch + 1 < plan.epochs:
            raise Stopped(stop, saved=f"the end of epoch {epoch + 1} of {plan.epochs}")


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    share: Share,
    scale: float,
    *,
    accelerator: Accelerator,
    normalize: Normalize,
    parts: int,
    max_grad_norm: float | None,
    criterion: Criterion = PLAIN,
    blend: MixedTarget | None = None,
    l2_sp: L2SP | None = None,
) -> tuple[Tensor, Tensor]:
    """Make one update on the gradient of `backward`, clipped to `max_grad_norm` if given; returns what that does."""
    found = backward(
        model,
        share,
        scale,
        accelerator=accelerator,
        normalize=normalize,
        parts=parts,
        criterion=criterion,
        blend=blend,
    )
    if max_grad_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), max_grad_norm)
    if l2_sp is not None:
        if max_grad_norm is None:  # which has undone fp16's loss scaling already
            accelerator.unscale_gradients(optimizer)
        l2_sp.apply(optimizer)
    optimizer.step()
    optimizer.zero_grad()
    return found


def backward(
    model: nn.Module,
    share: Share,
    scale: float,
    *,
    accelerator: Accelerator,
    normalize: Normalize,
    parts: int = 1,
    criterion: Criterion = PLAIN,
    blend: MixedTarget | None = None,
) -> tuple[Tensor, Tensor]:
    """Add `scale` times the gradient of the share's summed loss to the parameters' gradients, over all ranks.

    Auxiliary outputs have the same loss, in their measure.

    The share goes through in up to `parts` pieces, of which only the last one synchronises the ranks; each
    rank has exactly one such piece, so that unequal and empty shares meet.

    Returns:
        (summed loss of the main output, right answers) of the share: float64 and int64 scalars on the device.
        Where labels are mixed, those of the greater weight are right.

    """
    images, labels, _ = share
    loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    pieces = split_micro_batches(len(labels), parts)
    for piece in pieces:
        is_last = piece is pieces[-1]
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            if piece.stop == piece.start:
                loss = _zero_loss(model, images, normalize)
            else:
                wanted, mixed = labels[piece], None if blend is None else blend[piece]
                logits, auxiliary = split_outputs(model(normalize(images[piece])))
                loss = main = criterion(logits, wanted, mixed)
                for weight, other in auxiliary:
                    loss = loss + weight * criterion(other, wanted, mixed)
                loss_sum += main.detach()
                correct += (logits.detach().argmax(dim=1) == wanted).sum()
            accelerator.backward(loss * scale)
    return loss_sum, correct


def split_micro_batches(size: int, parts: int) -> list[slice]:
    """Return up to `parts` slices of nearly equal length that cover range(size); one empty slice for size 0."""
    parts = max(1, min(parts, size))
    edges = [i * size // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _zero_loss(model: nn.Module, images: Tensor, normalize: Normalize) -> Tensor:
    """Return a loss of exactly 0 that depends on every parameter, so that an empty share meets the other ranks.

    A blank picture goes through, since not every layer takes a batch of none; BatchNorm looks the other way.
    """
    blank = images.new_zeros(1, *images.shape[1:])
    with batch_norm_in_eval(model):
        logits, auxiliary = split_outputs(model(normalize(blank)))
    total = logits.float().sum() + sum(other.float().sum() for _, other in auxiliary)
    zero: Tensor = torch.where(torch.isfinite(total), total, torch.zeros_like(total)) * 0
    return zero


def _not_finite(
    step: int, plan: TrainSchedule, batch_paths: Callable[[int, int], Sequence[str]]
) -> UserError:
    epoch, epoch_step = divmod(step, plan.steps_per_epoch)
    paths: Any = batch_paths(epoch, epoch_step)
    shown = "".join(f"\n  {path}" for path in paths)
    return UserError(
        f"the loss is not finite since step {step + 1} (epoch {epoch + 1}, batch {epoch_step + 1}): training has "
        "diverged. Nothing of it was saved; earlier epochs are as they were. Try a smaller optim.lr or "
        "optim.head_lr_scale, a warm-up, optim.max_grad_norm, or train.precision fp32. "
        f"That batch's {len(paths)} examples:{shown}"
    )
