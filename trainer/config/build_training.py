"""From a config to the training itself: the schedule, the state, and the update."""

from collections.abc import Sequence
from functools import partial

import torch
from rich.console import Console

from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.data.sampler import EpochOrder
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.model.built import BuiltModel
from trainer.optim.ema import ModelEma
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.schedule import TrainSchedule, get_lr_multiplier, warmup_steps
from trainer.optim.train_step import TrainStep
from trainer.state import TrainState
from trainer.transfer.gradual_unfreezing import GradualUnfreezing
from trainer.transfer.l2_sp import L2SP


def make_schedule(config: ResolvedConfig, order: EpochOrder) -> TrainSchedule:
    """Return the updates of the run; durations become steps here.

    Raises:
        UserError: the warm-up is longer than the run.

    """
    steps = order.steps_per_epoch
    total = steps * config.train.epochs
    warmup = warmup_steps(config.optim.warmup, steps_per_epoch=steps, total_steps=total)
    if warmup > total:
        raise UserError(
            f"optim.warmup is {config.optim.warmup!r}, {warmup} steps, but the run has {total}: the peak learning rate "
            "would not be reached"
        )
    return TrainSchedule(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        logs_per_epoch=config.train.logs_per_epoch,
        lr_multiplier=partial(
            get_lr_multiplier, total_steps=total, warmup_steps=warmup, kind=config.optim.schedule
        ),
    )


def make_train_state(
    built: BuiltModel,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    ctx: DistributedContext,
    console: Console,
) -> tuple[TrainState, GradualUnfreezing]:
    """Wrap model and optimizer by accelerate; return the state before the first update, and what wraps each stage."""
    ctx.reset()
    unfreezing = GradualUnfreezing(
        ctx,
        built.model,
        optimizer,
        stages=built.unfreeze_stages,
        batch_norm=config.transfer.batch_norm,
        log=console.print,
    )
    state = TrainState(
        model=unfreezing.unwrapped,
        optimizer=unfreezing.optimizer,
        ema=ModelEma(unfreezing.unwrapped, config.regularization.ema),
        scaler=ctx.accelerator.scaler,
    )
    return state, unfreezing


def make_train_step(
    config: ResolvedConfig, examples_per_class: Sequence[int], ctx: DistributedContext, l2_sp: L2SP
) -> TrainStep:
    """Return the update; balanced class weights come from the number of training examples of each class."""
    regularization = config.regularization
    weights = None
    if regularization.class_weights == "balanced":
        weights = balanced_weights(examples_per_class).to(ctx.device)
    return TrainStep(
        ctx=ctx,
        normalize=Normalize(config.data.preprocessing, ctx.device),
        criterion=Criterion(label_smoothing=regularization.label_smoothing, class_weights=weights),
        mixup=Mixup(
            mixup_alpha=regularization.mixup,
            cutmix_alpha=regularization.cutmix,
            seed=config.run.seed,
            rank=ctx.rank,
            world_size=ctx.world_size,
            gather=ctx.accelerator.gather,
        ),
        l2_sp=l2_sp,
        loss_reduction=config.optim.loss_reduction,
        grad_accum_steps=config.train.grad_accum_steps,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.run.seed,
    )
