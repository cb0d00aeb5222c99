"""Gradual unfreezing: more parameters train from one stage to the next (Howard & Ruder 2018, ULMFiT)."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from trainer.distributed.context import DistributedContext
from trainer.model.built import UnfreezeStage
from trainer.model.freeze import BatchNormMode, apply_stage, stage_at
from trainer.model.frozen_dtype import store_frozen_weights
from trainer.transfer.frozen_features import StageFeatures


class GradualUnfreezing:
    """Wraps what trains in each stage. It holds the only reference to DDP's wrapper, so that old hooks are removed."""

    def __init__(
        self,
        ctx: DistributedContext,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        stages: Sequence[UnfreezeStage],
        batch_norm: BatchNormMode,
        features: StageFeatures,
        frozen_dtype: torch.dtype = torch.float32,
        log: Callable[[str], object],
    ) -> None:
        """Wrap a model in its first stage, and the optimizer.

        Args:
            ctx: the processes.
            model: unwrapped.
            optimizer: for all parameters that train in any stage.
            stages: in order; a single one for a run without gradual unfreezing.
            batch_norm: the option `transfer.batch_norm`.
            features: what trains in a stage, and on what.
            frozen_dtype: dtype of frozen weights from the first epoch on.
            log: called with one line when a stage starts.

        """
        self.model, self.optimizer = ctx.prepare(model, optimizer)
        self.unwrapped = ctx.unwrap(self.model)
        self._ctx, self._stages, self._batch_norm, self._log = ctx, stages, batch_norm, log
        self._frozen_dtype = frozen_dtype
        self._stage, self._features, self._trained = stages[0], features, self.unwrapped

    def restore_stage(self, epoch: int) -> None:
        """Apply the stage of an epoch (counted from 0) to the model, before a checkpoint is restored into it."""
        apply_stage(self.unwrapped, stage_at(self._stages, epoch), self._batch_norm)

    def start_epoch(self, epoch: int, interrupted: Callable[[], bool] = lambda: False) -> nn.Module:
        """Return what trains in an epoch (counted from 0), wrapped. A new stage has a new wrapper.

        Raises:
            Interrupted: `interrupted` returned True while the features of the epoch were computed.

        """
        stage = stage_at(self._stages, epoch)
        apply_stage(self.unwrapped, stage, self._batch_norm)
        store_frozen_weights(self.unwrapped, self._frozen_dtype)
        if stage is not self._stage and epoch == stage.start_epoch:
            count = sum(p.numel() for p in self.unwrapped.parameters() if p.requires_grad)
            self._log(f"  from epoch {epoch + 1} on, {count:,} parameters train")
        trained = self._features.start_stage()
        if stage is not self._stage or trained is not self._trained:
            self._stage, self._trained = stage, trained
            del self.model
            self.model = self._wrap(trained)
        self._features.start_epoch(epoch, interrupted)
        return self.model

    def _wrap(self, trained: nn.Module) -> nn.Module:
        if trained is self.unwrapped:
            return self._ctx.rewrap_ddp(trained, self.optimizer)
        self._ctx.accelerator.free_memory()  # its reference to the old wrapper
        return self._ctx.prepare(trained, self.optimizer)[0]
