"""From a config to the model to train: architecture, weights, output layer, what is trainable, parameter groups."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace

import torch
from rich.console import Console
from torch import Tensor

from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.model.batch_norm import convert_sync_batch_norm
from trainer.model.built import BuiltModel
from trainer.model.create import build_model
from trainer.model.freeze import apply_stage, make_stages
from trainer.model.patterns import match_names
from trainer.model.source_classes import ClassMapping
from trainer.optim.param_groups import ParamGroup, create_optimizer, group_parameters
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay
from trainer.transfer.linear_probe import fit_head, held_out_mask, require_linear


def make_model(
    config: ResolvedConfig,
    classes: Sequence[str],
    weights: str | None,
    *,
    world_size: int = 1,
    on_progress: Callable[[str], None],
) -> BuiltModel:
    """Return the model with its new output layer, drawn from `run.seed`, in the memory layout that it trains in.

    Args:
        config: the run's.
        classes: names of the classes to train on.
        weights: a torchvision name, a file, or None for random weights.
        world_size: number of processes.
        on_progress: called with one line before a download.

    Raises:
        UserError: see `build_model` and `make_stages`.

    """
    torch.manual_seed(derive_seed("weights", config.run.seed))
    built = build_model(
        config.model.name,
        image_size=config.data.image_size,
        num_classes=len(classes),
        weights=weights,
        # The key is that of model.weights, not of a pretraining phase.
        weights_key=config.model.weights_key if weights == config.model.weights else "auto",
        allow_partial_weights=config.model.allow_partial_weights,
        head_init=config.model.head_init,
        class_mapping=_class_mapping(config, classes, weights),
        dropout=config.model.dropout,
        stochastic_depth=config.model.stochastic_depth,
        gradient_checkpointing=config.train.gradient_checkpointing,
        on_progress=on_progress,
    )
    if config.model.head_init == "linear-probe":
        require_linear(built.model, built.heads[0], config.data.image_size)
    if config.transfer.batch_norm == "sync" and world_size > 1:
        built = replace(built, model=convert_sync_batch_norm(built.model))
    if config.train.uses_channels_last:
        built.model.to(memory_format=torch.channels_last)
    stages = make_stages(config.transfer.trainable, built.model, built.heads, built.layer_order)
    apply_stage(built.model, stages[0], config.transfer.batch_norm)
    notes = [
        f"transfer.trainable: the run ends after epoch {config.train.epochs}, before the stage that starts with epoch "
        f"{stage.start_epoch + 1}"
        for stage in stages
        if stage.start_epoch >= config.train.epochs
    ]
    if weights is None and len(stages[-1].trainable) < len(list(built.model.parameters())):
        notes.append(
            "transfer.trainable: frozen parameters keep their random values, since there are no pretrained weights. "
            "Set model.weights or pretrain.root, or transfer.trainable all"
        )
    return replace(built, unfreeze_stages=stages, summary=(*built.summary, *notes))


def _class_mapping(config: ResolvedConfig, classes: Sequence[str], weights: str | None) -> ClassMapping | None:
    """Return the class names that head_init source-labels matches; None for other kinds of start."""
    if config.model.head_init != "source-labels" or weights is None:
        return None
    return ClassMapping.from_weights(
        weights, targets=tuple(classes), sources=config.model.source_labels, aliases=config.model.aliases
    )


def apply_last_stage(built: BuiltModel, config: ResolvedConfig) -> None:
    """Unfreeze what trains in the last stage of transfer.trainable."""
    apply_stage(built.model, built.unfreeze_stages[-1], config.transfer.batch_norm)


def make_l2_sp(built: BuiltModel, config: ResolvedConfig) -> L2SP:
    """Return L2-SP towards the weights that the model has now; it does nothing where transfer.l2_sp is 0."""
    parameters = backbone_parameters(built.model, built.heads)
    return L2SP(parameters, config.transfer.l2_sp, decoupled=config.optim.name == "adamw")


def make_param_groups(built: BuiltModel, config: ResolvedConfig) -> tuple[ParamGroup, ...]:
    """Return the parameter groups of all that trains in any stage.

    Raises:
        UserError: a pattern of optim.lr_mult that matches no parameter.

    """
    groups = group_parameters(
        built.model,
        built.heads,
        lr=config.optim.lr,
        head_lr_scale=config.optim.head_lr_scale,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        lr_mult=_lr_mult(built, config),
        trainable=built.unfreeze_stages[-1].trainable,
    )
    if not config.transfer.l2_sp:
        return groups
    return without_weight_decay(groups, backbone_parameters(built.model, built.heads))


def make_optimizer(groups: Sequence[ParamGroup], config: ResolvedConfig) -> torch.optim.Optimizer:
    """Return the optimizer. The parameters must be on their device: the optimizer's kernels are chosen by it."""
    return create_optimizer(config.optim.name, groups, momentum=config.optim.momentum)


def _lr_mult(built: BuiltModel, config: ResolvedConfig) -> dict[str, float]:
    """Return parameter name -> multiple of the learning rate: layer decay by depth, times optim.lr_mult by pattern."""
    depth = built.layer_order.depth
    in_head = tuple(f"{head}." for head in built.heads)
    by_depth = {
        name: 1.0 if name.startswith(in_head) else config.optim.layer_decay**blocks_after
        for name, blocks_after in depth.items()
    }
    by_pattern: dict[str, float] = {}
    for pattern, multiple in config.optim.lr_mult.items():
        names = match_names(pattern, depth)
        if not names:
            blocks = ", ".join(block.name for block in built.layer_order.blocks)
            raise UserError(f"optim.lr_mult: {pattern!r} matches no parameter of this model; its blocks are {blocks}")
        by_pattern |= dict.fromkeys(names, multiple)
    return {name: multiple * by_pattern.get(name, 1.0) for name, multiple in by_depth.items()}


def fit_linear_probe(  # noqa: PLR0917 (each is another object)
    built: BuiltModel,
    loader: Iterable[tuple[Tensor, Tensor, Tensor]],
    labels: Sequence[int],
    config: ResolvedConfig,
    ctx: DistributedContext,
    console: Console,
    *,
    groups: Sequence[str | None] = (),
    watchdog: Callable[[Heartbeat], AbstractContextManager[Heartbeat]],
) -> float:
    """Fit the model's output layer by a linear probe. Every process must call it. Returns the seconds it took.

    Args:
        built: the model, on its device.
        loader: this process's batches of one pass over the training images.
        labels: of all training images.
        config: the run's.
        ctx: the processes.
        console: prints the result.
        groups: of all training images; None for one without a group.
        watchdog: returns what watches over the pass.

    """
    return fit_head(
        built.model,
        built.heads[0],
        loader,
        labels,
        balanced=config.regularization.class_weights == "balanced",
        held_out=held_out_mask(torch.tensor(labels), config.run.seed, groups),
        normalize=Normalize(config.data.preprocessing, ctx.device),
        ctx=ctx,
        watchdog=watchdog,
        log=console.print,
    )
