"""Gather the logits of a split from all processes, and check that each example was predicted once."""

import torch
from torch import Tensor

from trainer.distributed.context import DistributedContext
from trainer.evaluation.predictions import Predictions

_MAX_PENDING = 64
"""Batches that stay on the device: a copy to the CPU waits for all that was computed before."""


class PredictionGatherer:
    """Gathers the logits of all processes on rank 0, as the argument `record` of `evaluate`."""

    def __init__(self, ctx: DistributedContext, *, examples: int, classes: int, batch_size: int) -> None:
        """Make room on rank 0.

        Args:
            ctx: the processes.
            examples: number of examples of the split.
            classes: number of classes.
            batch_size: greatest number of examples in a batch of a process.

        """
        self._ctx, self._batch_size = ctx, batch_size
        count = examples if ctx.is_main_process else 0
        self._logits = torch.empty(count, classes)
        self._labels = torch.empty(count, dtype=torch.int64)
        self._counts = torch.zeros(count, dtype=torch.int64)
        self._pending: list[tuple[Tensor, Tensor, Tensor]] = []

    def __call__(self, logits: Tensor, labels: Tensor, examples: Tensor) -> None:
        """Add a batch of this process; it may be empty. Every process must call it.

        Args:
            logits: float32 [B, K].
            labels: int64 [B].
            examples: int64 [B], indices into the examples of the split.

        """
        batch = (logits, labels, examples)
        if self._ctx.world_size > 1:
            batch = (self._gather(logits), self._gather(labels), self._gather(examples, fill=-1))
        if self._ctx.is_main_process:
            self._pending.append(batch)
            if len(self._pending) == _MAX_PENDING:
                self._flush()

    def _flush(self) -> None:
        """Copy the batches from the device."""
        if not self._pending:
            return
        logits, labels, examples = (torch.cat(parts).cpu() for parts in zip(*self._pending, strict=True))
        self._pending.clear()
        is_example = examples >= 0
        local = examples[is_example]
        self._logits[local], self._labels[local] = logits[is_example], labels[is_example]
        self._counts.index_add_(0, local, torch.ones_like(local))

    def predictions(self) -> Predictions | None:
        """Return the predictions of all examples on rank 0, None on the other ranks.

        Raises:
            RuntimeError: an example was not predicted, or more than once.

        """
        if not self._ctx.is_main_process:
            return None
        self._flush()
        once = int((self._counts == 1).sum())
        if once != len(self._counts):
            raise RuntimeError(f"{once} of {len(self._counts)} examples were predicted once")
        return Predictions(self._logits, self._labels)

    def _gather(self, tensor: Tensor, *, fill: int = 0) -> Tensor:
        """Return the tensors of all processes, each padded to the batch size."""
        missing = self._batch_size - len(tensor)
        padded = torch.cat([tensor, tensor.new_full((missing, *tensor.shape[1:]), fill)])
        gathered: Tensor = self._ctx.accelerator.gather(padded)
        return gathered
