"""Gradual unfreezing: other parameters train from one epoch to the next (Howard & Ruder 2018, ULMFiT)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from trainer.distributed.context import DistributedContext
from trainer.model.built import UnfreezeStage
from trainer.model.freeze import BatchNormMode, apply_stage, stage_at


class GradualUnfreezing:
    """Wraps the model for each stage. It holds the only reference to DDP's wrapper, so that old hooks are freed."""

    def __init__(
        self,
        ctx: DistributedContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stages: Sequence[UnfreezeStage],
        batch_norm: BatchNormMode,
        log: Callable[[str], object],
    ) -> None:
        """Wrap a model that is in the first stage, and its optimizer.

        Args:
            ctx: the processes.
            model: not wrapped.
            optimizer: over all parameters that train in any stage.
            stages: in order; one stage alone for a run without gradual unfreezing.
            batch_norm: the option `transfer.batch_norm`.
            log: told when a stage begins.

        """
        self.model, self.optimizer = ctx.prepare(model, optimizer)
        self.unwrapped = ctx.unwrap(self.model)
        self._ctx, self._stages, self._batch_norm, self._log = ctx, stages, batch_norm, log
        self._stage = stages[0]

    def restore_stage(self, epoch: int) -> None:
        """Put the unwrapped model into the stage of an epoch (from 0), before a checkpoint is restored into it."""
        apply_stage(self.unwrapped, stage_at(self._stages, epoch), self._batch_norm)

    def start_epoch(self, epoch: int) -> nn.Module:
        """Return the wrapped model for an epoch (from 0): another wrapper if a new stage begins with the epoch."""
        stage = stage_at(self._stages, epoch)
        apply_stage(self.unwrapped, stage, self._batch_norm)
        if stage is not self._stage:
            if epoch == stage.start_epoch:
                count = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
                self._log(f"  from epoch {epoch + 1} on, {count:,} parameters train")
            self._stage = stage
            del self.model
            self.model = self._ctx.rewrap_ddp(self.unwrapped, self.optimizer)
        return self.model
