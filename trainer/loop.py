"""Training: one function that reads from top to bottom, and the update it is made of."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.meter import Figures, Meter
from trainer.model.batch_norm import average_statistics, batch_norm_in_eval
from trainer.model.head import split_outputs
from trainer.optim import current_lr, set_lr
from trainer.seeds import derive_seed

Share = tuple[Tensor, Tensor, Tensor]
"""One process's part of a global batch: images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]."""
Normalise = Callable[[Tensor], Tensor]
"""uint8 images [B, 3, H, W] -> the model's input."""
Evaluations = dict[str, Evaluation]
"""Part of the data (`test`, `val`) -> what a pass over it found."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Which updates are made."""

    batch_sizes: tuple[int, ...]
    """Examples of each global batch of an epoch, in order; there are as many as an epoch has steps."""
    epochs: int
    start_epoch: int
    """Epochs that were trained before."""
    loss_reduction: Literal["mean", "sum"]
    accumulation: int
    clip_norm: float | None
    seed: int
    points_per_epoch: int
    lr_factor: Callable[[int], float]
    """Step of the run, counted from 0 -> share of the peak learning rate."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of updates of an epoch."""
        return len(self.batch_sizes)

    @property
    def points(self) -> frozenset[int]:
        """Return the steps of an epoch, counted from 1, after which figures are read; the last is one of them."""
        wanted = min(self.points_per_epoch, self.steps_per_epoch)
        return frozenset(math.ceil(i * self.steps_per_epoch / wanted) for i in range(1, wanted + 1))


@dataclass(frozen=True, kw_only=True)
class Progress:
    """Where the run stands, and the figures of its epoch so far."""

    epoch: int
    """Counted from 1."""
    epoch_step: int
    """Updates made in the epoch."""
    step: int
    """Updates made in the run."""
    figures: Figures
    lr: dict[str, float]
    """Parameter group -> learning rate of the last update."""


class Listener(Protocol):
    """What the loop tells of itself. Figures are over all processes, and known to every rank."""

    def step(self, epoch: int, epoch_step: int) -> None:
        """Hear that an update was issued: without figures, so that the device need not be waited for."""

    def point(self, progress: Progress) -> None:
        """Hear the figures read within an epoch."""

    def epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Hear that an epoch has ended and was evaluated; called before anything is saved."""


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterator[Share],
    plan: Plan,
    *,
    accelerator: Accelerator,
    normalise: Normalise,
    evaluate: Callable[[nn.Module], Evaluations],
    save: Callable[[Progress, Evaluations], None],
    listener: Listener,
    paths_of: Callable[[int, int], Sequence[str]],
) -> None:
    """Train from the end of `plan.start_epoch` to that of the last epoch.

    Args:
        model: wrapped by accelerate.
        optimizer: prepared by accelerate; its groups carry `peak_lr`.
        batches: this process's share of every update to be made, over all epochs.
        plan: which updates are made.
        accelerator: of the process group.
        normalise: from stored pictures to the model's input.
        evaluate: the bare model -> what each evaluated part found; called at the end of each epoch.
        save: called at the end of each epoch, once its losses are known to be finite.
        listener: hears of progress, and of figures where they are read.
        paths_of: (epoch, step of the epoch), both from 0 -> the files of that global batch.

    Raises:
        UserError: the loss, or the model's output after an epoch, is not finite.

    """
    bare = accelerator.unwrap_model(model, keep_fp32_wrapper=True)
    rank, world = accelerator.process_index, accelerator.num_processes
    points = plan.points
    model.train()
    for epoch in range(plan.start_epoch, plan.epochs):
        meter = Meter(accelerator)
        for epoch_step, size in enumerate(plan.batch_sizes):
            step = epoch * plan.steps_per_epoch + epoch_step
            share = next(batches)
            meter.arrived()
            set_lr(optimizer, plan.lr_factor(step))
            # The masks of dropout and stochastic depth belong to (seed, step, rank), not to what ran before.
            torch.manual_seed(derive_seed("masks", plan.seed, step, rank))
            # DDP averages the gradients over the ranks: times world, that is their sum.
            scale = world / size if plan.loss_reduction == "mean" else float(world)
            loss_sum, correct = update(
                model,
                optimizer,
                share,
                scale,
                accelerator=accelerator,
                normalise=normalise,
                parts=plan.accumulation,
                clip_norm=plan.clip_norm,
            )
            meter.updated(step, len(share[1]), loss_sum, correct)
            listener.step(epoch + 1, epoch_step + 1)
            if epoch_step + 1 in points:
                figures = meter.read()
                if figures.bad_step is not None:
                    raise _not_finite(figures.bad_step, plan, paths_of)
                progress = Progress(
                    epoch=epoch + 1,
                    epoch_step=epoch_step + 1,
                    step=step + 1,
                    figures=figures,
                    lr=current_lr(optimizer),
                )
                listener.point(progress)
        if figures.seen != sum(plan.batch_sizes):
            raise RuntimeError(f"trained on {figures.seen} examples, expected {sum(plan.batch_sizes)}")
        average_statistics(bare, world)
        evaluations = evaluate(bare)
        if not all(math.isfinite(e.loss_sum) for e in evaluations.values()):
            raise _not_finite(step, plan, paths_of)
        listener.epoch(progress, evaluations)
        save(progress, evaluations)


def update(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    share: Share,
    scale: float,
    *,
    accelerator: Accelerator,
    normalise: Normalise,
    parts: int,
    clip_norm: float | None,
) -> tuple[Tensor, Tensor]:
    """Make one update on the gradient of `backward`, clipped to `clip_norm` if given; returns what that does."""
    found = backward(model, share, scale, accelerator=accelerator, normalise=normalise, parts=parts)
    if clip_norm is not None:
        accelerator.clip_grad_norm_(model.parameters(), clip_norm)
    optimizer.step()
    optimizer.zero_grad()
    return found


def backward(
    model: nn.Module,
    share: Share,
    scale: float,
    *,
    accelerator: Accelerator,
    normalise: Normalise,
    parts: int = 1,
) -> tuple[Tensor, Tensor]:
    """Add `scale` times the gradient of the share's summed loss to the parameters' gradients, over all ranks.

    The share goes through in up to `parts` pieces, of which only the last one synchronises the ranks; each
    rank has exactly one such piece, so that unequal and empty shares meet.

    Returns:
        (summed cross-entropy, right answers) of the share: float64 and int64 scalars on the device.

    """
    images, labels, _ = share
    loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
    correct = torch.zeros((), dtype=torch.int64, device=labels.device)
    pieces = cut(len(labels), parts)
    for piece in pieces:
        is_last = piece is pieces[-1]
        with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
            if piece.stop == piece.start:
                loss = _nothing(model, images, normalise)
            else:
                logits, auxiliary = split_outputs(model(normalise(images[piece])))
                loss = plain = cross_entropy(logits.float(), labels[piece], reduction="sum")
                for weight, other in auxiliary:
                    loss = loss + weight * cross_entropy(other.float(), labels[piece], reduction="sum")
                loss_sum += plain.detach()
                correct += (logits.detach().argmax(dim=1) == labels[piece]).sum()
            accelerator.backward(loss * scale)
    return loss_sum, correct


def cut(size: int, parts: int) -> list[slice]:
    """Return up to `parts` slices of nearly equal length that cover range(size); one empty slice for size 0."""
    parts = max(1, min(parts, size))
    edges = [i * size // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]


def _nothing(model: nn.Module, images: Tensor, normalise: Normalise) -> Tensor:
    """Return a loss of exactly 0 that depends on every parameter, so that an empty share meets the other ranks.

    A blank picture goes through, since not every layer takes a batch of none; BatchNorm looks the other way.
    """
    blank = images.new_zeros(1, *images.shape[1:])
    with batch_norm_in_eval(model):
        logits, auxiliary = split_outputs(model(normalise(blank)))
    total = logits.float().sum() + sum(other.float().sum() for _, other in auxiliary)
    zero: Tensor = torch.where(torch.isfinite(total), total, torch.zeros_like(total)) * 0
    return zero


def _not_finite(step: int, plan: Plan, paths_of: Callable[[int, int], Sequence[str]]) -> UserError:
    epoch, epoch_step = divmod(step, plan.steps_per_epoch)
    paths: Any = paths_of(epoch, epoch_step)
    shown = "".join(f"\n  {path}" for path in paths)
    return UserError(
        f"the loss is not finite since step {step + 1} (epoch {epoch + 1}, batch {epoch_step + 1}): training has "
        "diverged. Nothing of it was saved; earlier epochs are as they were. Try a smaller optim.lr or "
        "optim.head_lr_scale, a warm-up, optim.clip_norm, or train.precision fp32. "
        f"That batch's {len(paths)} examples:{shown}"
    )
