"""From a config to the training itself: the state, and the update."""

from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console

from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.distributed.context import DistributedContext
from trainer.model.built import BuiltModel
from trainer.model.compile import compile_model
from trainer.optim.ema import ModelEma
from trainer.optim.loss import Criterion, balanced_weights
from trainer.optim.mixup import Mixup
from trainer.optim.param_groups import ParamGroup
from trainer.optim.train_step import TrainStep
from trainer.report.block_table import block_rows, block_table, write_blocks
from trainer.state import TrainState
from trainer.transfer.frozen_features import NoFeatures, StageFeatures
from trainer.transfer.gradual_unfreezing import GradualUnfreezing
from trainer.transfer.l2_sp import L2SP


def print_block_table(
    built: BuiltModel, groups: Sequence[ParamGroup], console: Console, *, folder: Path | None
) -> None:
    """Print what trains in each block, and its learning rates; write it into a folder for the report of the run."""
    console.print(block_table(built, groups))
    if folder is not None:
        write_blocks(folder, block_rows(built, groups), warn=console.print)


def make_train_state(
    built: BuiltModel,
    optimizer: torch.optim.Optimizer,
    config: ResolvedConfig,
    ctx: DistributedContext,
    console: Console,
    *,
    features: StageFeatures | None = None,
) -> tuple[TrainState, GradualUnfreezing]:
    """Wrap model and optimizer by accelerate; return the state before the first update, and what wraps each stage.

    Without `features`, the whole model trains in every stage. With train.compile, the model and its moving average are
    compiled.
    """
    ctx.reset()
    unfreezing = GradualUnfreezing(
        ctx,
        built.model,
        optimizer,
        stages=built.unfreeze_stages,
        batch_norm=config.transfer.batch_norm,
        features=features or NoFeatures(built.model, Normalize(config.data.preprocessing, ctx.device)),
        frozen_dtype=torch.bfloat16 if config.train.frozen_dtype == "bfloat16" else torch.float32,
        log=console.print,
    )
    state = TrainState(
        model=unfreezing.unwrapped,
        optimizer=unfreezing.optimizer,
        ema=ModelEma(unfreezing.unwrapped, config.regularization.ema),
        scaler=ctx.accelerator.scaler,
    )
    if config.train.compile:
        compile_model(state.model)
        if state.ema.enabled:
            compile_model(state.ema.model)
    return state, unfreezing


def make_train_step(
    config: ResolvedConfig, examples_per_class: Sequence[int], ctx: DistributedContext, l2_sp: L2SP
) -> TrainStep:
    """Return the update; balanced class weights come from the number of training examples of each class.

    With train.micro_batch_size auto, which is found later, it does not split the batch.
    """
    regularization, micro_batch_size = config.regularization, config.train.micro_batch_size
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
        micro_batch_size=None if micro_batch_size == "auto" else micro_batch_size,
        max_grad_norm=config.optim.max_grad_norm,
        seed=config.run.seed,
    )
