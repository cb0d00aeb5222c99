"""One update: forward and backward over micro-batches, gradient clipping, and the optimizer step."""

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
"""One process's part of a global batch: images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]. B may be 0."""


@dataclass(frozen=True, kw_only=True)
class TrainStep:
    """Makes one update on a global batch. Every process must call it, with its local batch."""

    ctx: DistributedContext
    normalize: Callable[[Tensor], Tensor]
    """Images [B, 3, H, W], uint8 or float in 0 to 255, or features of frozen layers -> the input of what trains."""
    criterion: Criterion
    mixup: Mixup
    l2_sp: L2SP
    loss_reduction: Literal["mean", "sum"]
    """Whether the gradient is that of the mean or of the sum of the loss over the global batch."""
    grad_accum_steps: int
    """Number of micro-batches that a local batch is split into, if `micro_batch_size` is None."""
    max_grad_norm: float | None
    """Maximum norm of the gradient; None: the gradient is not clipped."""
    seed: int
    """The run's seed."""
    micro_batch_size: int | None = None
    """Largest number of images of a micro-batch; None: split into `grad_accum_steps` micro-batches."""

    def plain(self) -> Self:
        """Return a step with plain cross-entropy: without label smoothing, class weights, mixup and L2-SP."""
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
            optimizer: prepared by accelerate, with the learning rates of this update.
            batch: the local batch of this process.
            step: number of the update; mixup and the masks of dropout are drawn from it.
            size: number of examples of the global batch.

        Returns:
            (summed loss, number of correct predictions) of the local batch; see `backward`.

        """
        images, labels, examples = batch
        images, labels, mixed = self.mixup(images, labels, step, size)
        # The masks of dropout and stochastic depth depend on (seed, step, rank), not on earlier random draws.
        torch.manual_seed(derive_seed("masks", self.seed, step, self.ctx.rank))
        # DDP averages gradients over the ranks. Multiplied by the world size, the average is their sum.
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
        """Add `scale` times the gradient of the summed loss over all ranks to the parameters' gradients.

        Auxiliary outputs have the same loss, times their weight. The local batch is split into micro-batches, and DDP
        reduces the gradients in the last one only. Every rank has exactly one last micro-batch, so the collectives
        match even if local batches differ in size or are empty.

        Returns:
            (summed loss of the main output, number of correct predictions) of the local batch: float64 and int64
            scalars on the device. With mixed labels, the label of the greater weight is the correct one.

        """
        images, labels, _ = batch
        accelerator = self.ctx.accelerator
        loss_sum = torch.zeros((), dtype=torch.float64, device=labels.device)
        correct = torch.zeros((), dtype=torch.int64, device=labels.device)
        size = self.micro_batch_size
        count = self.grad_accum_steps if size is None else -(-len(labels) // size)
        micro_batches = split_micro_batches(len(labels), count)
        for micro_batch in micro_batches:
            is_last = micro_batch is micro_batches[-1]
            with contextlib.nullcontext() if is_last else accelerator.no_sync(model):
                if micro_batch.stop == micro_batch.start:
                    loss = self._zero_loss(model, images)
                else:
                    target = labels[micro_batch]
                    mixed_target = None if mixed is None else mixed[micro_batch]
                    logits, auxiliary = split_outputs(model(self.normalize(images[micro_batch])))
                    loss = main = self.criterion(logits, target, mixed_target)
                    for weight, aux_logits in auxiliary:
                        loss = loss + weight * self.criterion(aux_logits, target, mixed_target)
                    loss_sum += main.detach()
                    correct += (logits.detach().argmax(dim=1) == target).sum()
                accelerator.backward(loss * scale)
        return loss_sum, correct

    def _zero_loss(self, model: nn.Module, images: Tensor) -> Tensor:
        """Return a loss of 0 that depends on every parameter, for a rank whose local batch is empty.

        DDP needs a backward pass on every rank, and not every layer accepts an empty batch. The model therefore
        gets a blank image. BatchNorm uses its running statistics and does not update them.
        """
        blank = images.new_zeros(1, *images.shape[1:])
        with batch_norm_in_eval(model):
            logits, auxiliary = split_outputs(model(self.normalize(blank)))
        total = logits.float().sum() + sum(aux_logits.float().sum() for _, aux_logits in auxiliary)
        zero: Tensor = torch.where(torch.isfinite(total), total, torch.zeros_like(total)) * 0
        return zero


def split_micro_batches(size: int, count: int) -> list[slice]:
    """Return up to `count` slices of nearly equal length that cover range(size); one empty slice for size 0."""
    count = max(1, min(count, size))
    edges = [i * size // count for i in range(count + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(edges)]
