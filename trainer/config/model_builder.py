"""The target model, from the sections of the config: design, weights, output layer, what trains, parameter groups."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainer.config.builders import decoding_threads, eval_batch_size, make_loader
from trainer.config.schema import Config, OptimConfig
from trainer.data.augment import Normalize, Preprocessing, eval_transform
from trainer.data.index import DatasetIndex
from trainer.data.loader import EvalBatchSampler, ImageDataset
from trainer.distributed.context import DistributedContext
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.model.create import BuiltModel, build_model
from trainer.model.file import read_metadata
from trainer.model.freeze import apply_stage, make_stages
from trainer.model.patterns import match_names
from trainer.model.source_classes import ClassMapping
from trainer.optim.param_groups import ParamGroup, group_parameters
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import L2SP, backbone_parameters, without_weight_decay
from trainer.transfer.linear_probe import fit_head, require_linear


def make_model(
    config: Config,
    classes: Sequence[str],
    weights: str | None,
    *,
    world_size: int = 1,
    on_progress: Callable[[str], None],
) -> BuiltModel:
    """Return the model with its new head, drawn from `run.seed`, in the memory layout that it trains in.

    `on_progress` hears of a download before it begins.
    """
    torch.manual_seed(derive_seed("weights", config.run.seed))
    created = build_model(
        config.model.name,
        image_size=config.data.image_size,  # type: ignore[arg-type]
        num_classes=len(classes),
        weights=weights,
        head_init=config.model.head_init,
        labels=_labels(config, classes, weights),
        dropout=config.model.dropout,
        stochastic_depth=config.model.stochastic_depth,
        on_progress=on_progress,
    )
    if config.model.head_init == "linear-probe":
        require_linear(created.model, created.heads[0], config.data.image_size)  # type: ignore[arg-type]
    if config.transfer.batch_norm == "sync" and world_size > 1:
        created = replace(created, model=nn.SyncBatchNorm.convert_sync_batchnorm(created.model))
    if config.train.channels_last:
        created.model.to(memory_format=torch.channels_last)
    stages = make_stages(config.transfer.trainable, created.model, created.heads, created.layer_order)
    apply_stage(created.model, stages[0], config.transfer.batch_norm)
    late = [stage.start_epoch for stage in stages if stage.start_epoch >= config.train.epochs]
    notes = [
        f"transfer.trainable: the run ends after epoch {config.train.epochs}, before the stage that starts with epoch "
        f"{begins + 1}"
        for begins in late
    ]
    if weights is None and len(stages[-1].trainable) < len(list(created.model.parameters())):
        notes.append(
            "transfer.trainable: what does not train keeps the values that were drawn for it, for there is no source "
            "model: set model.weights or pretrain.root, or transfer.trainable all"
        )
    return replace(created, unfreeze_stages=stages, summary=(*created.summary, *notes))


def _labels(config: Config, classes: Sequence[str], weights: str | None) -> ClassMapping | None:
    """Return what source-labels needs to know of names."""
    if config.model.head_init != "source-labels" or weights is None:
        return None
    is_ours = weights.endswith(".safetensors") and Path(weights).is_file()
    described = read_metadata(weights) if is_ours else None
    return ClassMapping(
        targets=tuple(classes),
        sources=config.model.source_labels,
        described=described.classes if described else None,
        aliases=config.model.aliases,
    )


def fit_linear_probe(
    created: BuiltModel,
    index: DatasetIndex,
    preprocessing: Preprocessing,
    config: Config,
    ctx: DistributedContext,
    *,
    watch: Callable[[Heartbeat], AbstractContextManager[Heartbeat]],
    log: Callable[[str], object],
) -> float:
    """Give the model, on its device, the output layer of a linear probe on all processes; returns the seconds."""
    images = ImageDataset(
        index.train,
        eval_transform(preprocessing),
        seed=config.run.seed,
        threads=decoding_threads(config.data.num_workers, ctx),
    )
    slices = EvalBatchSampler(
        len(images),
        batch_size=eval_batch_size(config, ctx),
        rank=ctx.rank,
        world_size=ctx.world_size,
    )
    return fit_head(
        created.model,
        created.heads[0],
        make_loader(images, slices, config, ctx),
        [label for _, label in index.train],
        classes=len(index.classes),
        balanced=config.regularization.class_weights == "balanced",
        seed=config.run.seed,
        normalize=Normalize(preprocessing, ctx.accelerator.device),
        ctx=ctx,
        watch=watch,
        log=log,
    )


def make_l2_sp(created: BuiltModel, config: Config) -> L2SP | None:
    """Return the pull of a created model, as the source gave it, towards the source; None where there is none."""
    if not config.transfer.l2_sp:
        return None
    pulled_parameters = backbone_parameters(created.model, created.heads)
    return L2SP(pulled_parameters, config.transfer.l2_sp, decoupled=config.optim.name == "adamw")


def make_param_groups(created: BuiltModel, config: Config) -> tuple[ParamGroup, ...]:
    """Return the parameter groups of a created model, of all that trains in any of its stages."""
    groups = _groups(created, config)
    if not config.transfer.l2_sp:
        return groups
    return without_weight_decay(groups, backbone_parameters(created.model, created.heads))


def _groups(created: BuiltModel, config: Config) -> tuple[ParamGroup, ...]:
    return group_parameters(
        created.model,
        created.heads,
        lr=config.optim.lr,
        head_lr_scale=config.optim.head_lr_scale,
        weight_decay=config.optim.weight_decay,
        decay_norm_and_bias=config.optim.decay_norm_and_bias,
        scales=_lr_mult(created, config.optim),
        trains=created.unfreeze_stages[-1].trainable,
    )


def _lr_mult(created: BuiltModel, optim: OptimConfig) -> dict[str, float]:
    """Return parameter name -> multiple of its learning rate: lower with each block below the head, and by pattern.

    Raises:
        UserError: a pattern that matches nothing.

    """
    depth = created.layer_order.depth
    scales = {
        name: 1.0
        if name.startswith(tuple(f"{head}." for head in created.heads))
        else optim.layer_decay**after
        for name, after in depth.items()
    }
    by_pattern: dict[str, float] = {}
    for pattern, scale in optim.lr_mult.items():
        names = match_names(pattern, depth)
        if not names:
            blocks = ", ".join(block.name for block in created.layer_order.blocks)
            raise UserError(
                f"optim.lr_mult: {pattern!r} matches no parameter of this model; its blocks are {blocks}"
            )
        by_pattern |= dict.fromkeys(names, scale)
    return {name: scale * by_pattern.get(name, 1.0) for name, scale in scales.items()}
