"""Freeze and unfreeze parameters by stages, and BatchNorm statistics with them.

Frozen early layers are a strong regularization (Yosinski et al. 2014). Gradual unfreezing protects pretrained layers
from the first, large gradients of a new head (Howard & Ruder 2018, ULMFiT).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from trainer.model.batch_norm import freeze_batch_norm, named_batch_norms, unfreeze_batch_norm
from trainer.model.blocks import LayerOrder, trainable_parameters
from trainer.model.built import UnfreezeStage

BatchNormMode = Literal["frozen-with-weights", "frozen", "train", "sync"]


def make_stages(
    trainable: Mapping[int, str] | str, model: nn.Module, heads: Sequence[str], layer_order: LayerOrder
) -> tuple[UnfreezeStage, ...]:
    """Return the stages of a run in order. What trains in a stage also trains in all later ones.

    Args:
        trainable: a selection as for `blocks.trainable_parameters`, or first epoch of a stage -> selection.
        model: with its new output layers.
        heads: names of the output layers, which train in every stage.
        layer_order: of the model.

    Raises:
        UserError: a selection that this model does not have.

    """
    stages: list[UnfreezeStage] = []
    unfrozen: frozenset[str] = frozenset()
    for epoch, selection in sorted(({0: trainable} if isinstance(trainable, str) else trainable).items()):
        unfrozen |= trainable_parameters(selection, model, heads, layer_order)
        stages.append(UnfreezeStage(start_epoch=epoch, trainable=unfrozen))
    return tuple(stages)


def stage_at(stages: Sequence[UnfreezeStage], epoch: int) -> UnfreezeStage:
    """Return the stage of an epoch (counted from 0)."""
    return [stage for stage in stages if stage.start_epoch <= epoch][-1]


def apply_stage(model: nn.Module, stage: UnfreezeStage, mode: BatchNormMode) -> None:
    """Unfreeze exactly the stage's parameters, and freeze BatchNorm statistics by the mode.

    Frozen parameters need no gradient, so the backward pass ends at the first trainable layer. A model in DDP's wrapper
    must be wrapped again afterwards.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    frozen = frozen_batch_norms(model, stage, mode)
    for name, layer in named_batch_norms(model):
        if name in frozen:
            freeze_batch_norm(layer)
        else:
            unfreeze_batch_norm(layer, training=model.training)


def frozen_batch_norms(model: nn.Module, stage: UnfreezeStage, mode: BatchNormMode) -> frozenset[str]:
    """Return the names of the BatchNorm layers whose running statistics are frozen.

    Statistics belong to the weights before them. If a layer whose weights are frozen followed the statistics of the new
    data, it would shift features that are meant to stay unchanged.
    """
    names = [name for name, _ in named_batch_norms(model)]
    if mode == "train":
        return frozenset()
    if mode == "frozen":
        return frozenset(names)

    def is_trainable(name: str) -> bool:
        own = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters(recurse=False)]
        if own:
            return any(key in stage.trainable for key in own)
        # A layer without weights follows the parameters of its parent module.
        parent = f"{name.rpartition('.')[0]}.".lstrip(".")
        return any(key.startswith(parent) for key in stage.trainable)

    return frozenset(name for name in names if not is_trainable(name))
