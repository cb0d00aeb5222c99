"""One update: forward, loss, backward over micro-batches, and the optimizer's step."""

import contextlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, Self

import torch
from torch import Tensor, nn

from trainer.distributed.context import DistributedContext
from trainer.model.batch_norm import batch_norm_in_eval
from trainer.model.head import split_outputs
from trainer.optim.loss import CROSS_ENTROPY, Criterion, MixedTarget
from trainer.optim.mixup import Mixup
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import L2SP

LocalBatch = tuple[Tensor, Tensor, Tensor]
"""One process's part of a global batch: images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]; B may be 0."""


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Makes one update on a global batch. All processes call it together, each with its local batch."""

    ctx: DistributedContext
    normalize: Callable[[Tensor], Tensor]
    """Images [B, 3, H, W], uint8 or float in 0 to 255 -> the model's input."""
    criterion: Criterion
    mixup: Mixup
    l2_sp: L2SP
    loss_reduction: Literal["mean", "sum"]
    """Whether the mean or the sum of the loss over the global batch is differentiated."""
    grad_accum_steps: int
    """Number of micro-batches that a local batch is split into."""
    max_grad_norm: float | None
    """Norm that the gradient is clipped to; None: not clipped."""
    seed: int
    """The run's seed."""

    def plain(self) -> Self:
        """Return the step with cross-entropy alone: no smoothing, class weights, mixup or L2-SP."""
        return replace(
            self,
            criterion=CROSS_ENTROPY,
            mixup=replace(self.mixup, mixup_alpha=0.0, cutmix_alpha=0.0),
            l2_sp=L2SP([], 0.0, decoupled=False),
        )

    def __call__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, batch: LocalBatch, step: int, size: int
    ) -> tuple[Tensor, Tensor]:
        """Make update `step` (counted from 0 over the run) on a global batch of `size` examples.

        Args:
            model: wrapped by accelerate.
            optimizer: prepared by accelerate; its learning rates are set.
            batch: this process's part.
            step: seeds mixup and the masks of dropout.
            size: number of examples of the global batch.

        Returns:
            (summed loss, number of correct answers) of the local batch; see `backward`.

        """
        images, labels, examples = batch
        images, labels, mixed = self.mixup(images, labels, step, size)
        # The masks of dropout and stochastic depth depend on (seed, step, rank), not on what was drawn before.
        torch.manual_seed(derive_seed("masks", self.seed, step, self.ctx.rank))
        # DDP averages gradients over the ranks: multiplied by the world size, that is their sum.
        world_size = self.ctx.world_size
        scale = world_size / size if self.loss_reduction == "mean" else float(world_size)
        result = self.backward(model, (images, labels, examples), scale, mixed)
        accelerator = self.ctx.accelerator
        if self.max_grad_norm is not None:
            accelerator.clip_grad_norm_(model.parameters(), self.max_grad_norm)  # unscales fp16's gradients
        elif self.l2_sp.enabled:
            accelerator.unscale_gradients(optimizer)
        self.l2_sp.apply(optimizer)
        optimizer.step()
        optimizer.zero_grad()
        return result

    def backward(
        self, model: nn.Module, batch: LocalBatch, scale: float, mixed: MixedTarget | None = None
    ) -> tuple[Tensor, Tensor]:
        """Add `scale` times the gradient of the summed loss to the parameters' gradients, over all ranks.

        Auxiliary outputs have the same loss, times their own weight. The local batch goes through in micro-batches;
        DDP reduces the gradients in the last one only. Every rank has exactly one such micro-batch, so that local
        batches of different sizes, empty ones included, stay in step.

        Returns:
            (summed loss of the main output, number of correct answers) of the local batch: float64 and int64 scalars
            on the device. With mixed labels, an answer is correct if it is the label of the greater weight.

        """
        images, labels, _ = batch
        accelerator = self.ctx.accelerator
        loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
        correct = torch.zeros((), dtype=torch.int64, device=labels.device)
        parts = split_micro_batches(len(labels), self.grad_accum_steps)
        for part in parts:
            is_last = part is parts[-1]
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                if part.stop == part.start:
                    loss = self._zero_loss(model, images)
                else:
                    target, mixed_target = labels[part], None if mixed is None else mixed[part]
                    logits, auxiliary = split_outputs(model(self.normalize(images[part])))
                    loss = main = self.criterion(logits, target, mixed_target)
                    for weight, other in auxiliary:
                        loss = loss + weight * self.criterion(other, target, mixed_target)
                    loss_sum += main.detach()
                    correct += (logits.detach().argmax(dim=1) == target).sum()
                accelerator.backward(loss * scale)
        return loss_sum, correct

    def _zero_loss(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return a loss of exactly 0 that depends on every parameter, for a rank whose local batch is empty.

        DDP needs a backward pass on every rank. A blank image goes through the model, since not every layer takes an
        empty batch; BatchNorm uses its running statistics for it and does not change them.
        """
        blank = images.new_zeros(1, *images.shape[1:])
        with batch_norm_in_eval(model):
            logits, auxiliary = split_outputs(model(self.normalize(blank)))
        total = logits.float().sum() + sum(other.float().sum() for _, other in auxiliary)
        zero: Tensor = torch.where(torch.isfinite(total), total, torch.zeros_like(total)) * 0
        return zero


def split_micro_batches(size: int, parts: int) -> list[slice]:
    """Return up to `parts` slices of nearly equal length that cover range(size); one empty slice for size 0."""
    parts = max(1, min(parts, size))
    edges = [i * size // parts for i in range(parts + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
