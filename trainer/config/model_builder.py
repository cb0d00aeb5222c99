"""The target model, from the sections of the config: design, weights, output layer, what trains, parameter groups."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from trainer.config.builders import decoding_threads, images_at_a_time, loader_of
from trainer.config.schema import Config, OptimConfig
from trainer.data.augment import Normalise, Preprocessing, eval_transform
from trainer.data.index import ImageIndex
from trainer.data.loader import Images, Slices
from trainer.distributed.context import Runtime
from trainer.distributed.watchdog import Beats
from trainer.errors import UserError
from trainer.model.create import Created, create
from trainer.model.file import read_description
from trainer.model.freeze import enter, make_stages
from trainer.model.patterns import matching
from trainer.model.source_classes import Labels
from trainer.optim.param_groups import Group, group_parameters
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import Pull, outside, spare_decay
from trainer.transfer.linear_probe import probe, require_linear


def make_model(
    config: Config,
    classes: Sequence[str],
    weights: str | None,
    *,
    world: int = 1,
    on_progress: Callable[[str], None],
) -> Created:
    """Return the model with its new head, drawn from `run.seed`, in the memory layout that it trains in.

    `on_progress` hears of a download before it begins.
    """
    torch.manual_seed(derive_seed("weights", config.run.seed))
    created = create(
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
    if config.transfer.batch_norm == "sync" and world > 1:
        created = replace(created, model=nn.SyncBatchNorm.convert_sync_batchnorm(created.model))
    if config.train.channels_last:
        created.model.to(memory_format=torch.channels_last)
    stages = make_stages(config.transfer.train, created.model, created.heads, created.structure)
    enter(created.model, stages[0], config.transfer.batch_norm)
    late = [stage.begins for stage in stages if stage.begins >= config.train.epochs]
    notes = [
        f"transfer.train: the run ends after epoch {config.train.epochs}, before the stage from epoch {begins + 1} on"
        for begins in late
    ]
    if weights is None and len(stages[-1].trains) < len(list(created.model.parameters())):
        notes.append(
            "transfer.train: what does not train keeps the values that were drawn for it, for there is no source "
            "model: set model.weights or source.root, or transfer.train all"
        )
    return replace(created, stages=stages, lines=(*created.lines, *notes))


def _labels(config: Config, classes: Sequence[str], weights: str | None) -> Labels | None:
    """Return what source-labels needs to know of names."""
    if config.model.head_init != "source-labels" or weights is None:
        return None
    is_ours = weights.endswith(".safetensors") and Path(weights).is_file()
    described = read_description(weights) if is_ours else None
    return Labels(
        targets=tuple(classes),
        sources=config.model.source_labels,
        described=described.classes if described else None,
        aliases=config.model.aliases,
    )


def probe_head(
    created: Created,
    index: ImageIndex,
    preprocessing: Preprocessing,
    config: Config,
    machine: Runtime,
    *,
    watch: Callable[[Beats], AbstractContextManager[Beats]],
    say: Callable[[str], object],
) -> float:
    """Give the model, on its device, the output layer of a linear probe on all processes; returns the seconds."""
    images = Images(
        index.train,
        eval_transform(preprocessing),
        seed=config.run.seed,
        threads=decoding_threads(config.data.workers, machine),
    )
    slices = Slices(
        len(images),
        batch_size=images_at_a_time(config, machine),
        rank=machine.rank,
        world=machine.world,
    )
    return probe(
        created.model,
        created.heads[0],
        loader_of(images, slices, config, machine),
        [label for _, label in index.train],
        classes=len(index.classes),
        balanced=config.regularise.class_weights == "balanced",
        seed=config.run.seed,
        normalise=Normalise(preprocessing, machine.accelerator.device),
        machine=machine,
        watch=watch,
        say=say,
    )


def make_pull(created: Created, config: Config) -> Pull | None:
    """Return the pull of a created model, as the source gave it, towards the source; None where there is none."""
    if not config.transfer.l2_sp:
        return None
    pulled = outside(created.model, created.heads)
    return Pull(pulled, config.transfer.l2_sp, decoupled=config.optim.name == "adamw")


def make_groups(created: Created, config: Config) -> tuple[Group, ...]:
    """Return the parameter groups of a created model, of all that trains in any of its stages."""
    groups = _groups(created, config)
    if not config.transfer.l2_sp:
        return groups
    return spare_decay(groups, outside(created.model, created.heads))


def _groups(created: Created, config: Config) -> tuple[Group, ...]:
    return group_parameters(
        created.model,
        created.heads,
        lr=config.optim.lr,
        head_lr_scale=config.optim.head_lr_scale,
        weight_decay=config.optim.weight_decay,
        decay_norms=config.optim.decay_norms,
        scales=_lr_scales(created, config.optim),
        trains=created.stages[-1].trains,
    )


def _lr_scales(created: Created, optim: OptimConfig) -> dict[str, float]:
    """Return parameter name -> multiple of its learning rate: lower with each block below the head, and by pattern.

    Raises:
        UserError: a pattern that matches nothing.

    """
    depth = created.structure.depth
    scales = {
        name: 1.0
        if name.startswith(tuple(f"{head}." for head in created.heads))
        else optim.layer_decay**after
        for name, after in depth.items()
    }
    by_pattern: dict[str, float] = {}
    for pattern, scale in optim.lr_scales.items():
        names = matching(pattern, depth)
        if not names:
            blocks = ", ".join(block.name for block in created.structure.blocks)
            raise UserError(
                f"optim.lr_scales: {pattern!r} matches no parameter of this model; its blocks are {blocks}"
            )
        by_pattern |= dict.fromkeys(names, scale)
    return {name: scale * by_pattern.get(name, 1.0) for name, scale in scales.items()}
