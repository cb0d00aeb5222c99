"""A model as accelerate wraps it, which other parameters train in from one epoch to the next."""

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator
from torch import nn

from trainer.distributed import context
from trainer.model.freeze import BatchNormMode, UnfreezeStage, apply_stage, stage_at


class GradualUnfreezing:
    """Holds the one reference to the wrapped model: what DDP has hooked into goes when it does."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stages: Sequence[UnfreezeStage],
        policy: BatchNormMode,
        log: Callable[[str], object],
    ) -> None:
        """Wrap a bare model, which is in the first stage, and its optimizer, which knows all that ever trains."""
        self.model, self.optimizer = context.prepare(accelerator, model, optimizer)
        self.bare = accelerator.unwrap_model(self.model, keep_fp32_wrapper=True)
        self._accelerator, self._stages, self._policy, self._say = accelerator, stages, policy, log
        self._stage = stages[0]

    def restore_stage(self, epoch: int) -> None:
        """Put the bare model into the stage of an epoch (from 0), for a checkpoint to be put back into it."""
        apply_stage(self.bare, stage_at(self._stages, epoch), self._policy)

    def start_epoch(self, epoch: int) -> nn.Module:
        """Return the model for an epoch (from 0), wrapped anew if another stage begins with it."""
        stage = stage_at(self._stages, epoch)
        apply_stage(self.bare, stage, self._policy)
        if stage is not self._stage:
            if epoch == stage.start_epoch:
                count = sum(p.numel() for p in self.bare.parameters() if p.requires_grad)
                self._say(f"  from epoch {epoch + 1} on, {count:,} parameters train")
            self._stage = stage
            del self.model
            self.model = context.rewrap_ddp(self._accelerator, self.bare, self.optimizer)
        return self.model
