"""What trains, in stages; and what that means for BatchNorm.

Freezing the lower layers is the strongest regularisation there is (Yosinski et al. 2014); letting them loose one
after the other keeps what they know from the first, large gradients of a new head (Howard & Ruder 2018, ULMFiT).
"""

from collections.abc import Mapping, Sequence
from typing import Literal

from torch import nn

from trainer.model.batch_norm import freeze_batch_norm, named_batch_norms, unfreeze_batch_norm
from trainer.model.blocks import LayerOrder, trainable_parameters
from trainer.model.built import UnfreezeStage

BatchNormMode = Literal["frozen-with-weights", "frozen", "train", "sync"]


def make_stages(
    what: Mapping[int, str] | str, model: nn.Module, heads: Sequence[str], structure: LayerOrder
) -> tuple[UnfreezeStage, ...]:
    """Return the stages of a run, in their order; what trains in one trains in all that follow.

    Args:
        what: what trains, as `blocks.trained` takes it; or epoch -> that, from 0 on.
        model: with its new output layers.
        heads: their names, which train in every stage.
        structure: of the model.

    Raises:
        UserError: what trains means nothing in this model.

    """
    stages: list[UnfreezeStage] = []
    so_far: frozenset[str] = frozenset()
    for begins, text in sorted(({0: what} if isinstance(what, str) else what).items()):
        so_far |= trainable_parameters(text, model, heads, structure)
        stages.append(UnfreezeStage(start_epoch=begins, trainable=so_far))
    return tuple(stages)


def stage_at(stages: Sequence[UnfreezeStage], epoch: int) -> UnfreezeStage:
    """Return the stage that an epoch (counted from 0) lies in."""
    return [stage for stage in stages if stage.start_epoch <= epoch][-1]


def apply_stage(model: nn.Module, stage: UnfreezeStage, policy: BatchNormMode) -> None:
    """Have just the stage's parameters train, and BatchNorm's statistics by the policy.

    What does not train needs no gradient: nothing below the first layer that trains is kept for a backward pass.
    A model that DDP has wrapped has to be wrapped again after it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trainable)
    frozen = frozen_batch_norms(model, stage, policy)
    for name, layer in named_batch_norms(model):
        if name in frozen:
            freeze_batch_norm(layer)
        else:
            unfreeze_batch_norm(layer, training=model.training)


def frozen_batch_norms(model: nn.Module, stage: UnfreezeStage, policy: BatchNormMode) -> frozenset[str]:
    """Return the BatchNorm layers that keep the source's statistics: the names of the modules.

    Statistics belong to the weights before them. A layer whose own weights do not train, but that went on to follow
    the target's statistics, would shift the features of a part that is meant to stay as it is.
    """
    names = [name for name, _ in named_batch_norms(model)]
    if policy == "train":
        return frozenset()
    if policy == "frozen":
        return frozenset(names)

    def trains(name: str) -> bool:
        own = [f"{name}.{key}" for key, _ in model.get_submodule(name).named_parameters(recurse=False)]
        # One without weights goes with its neighbours.
        around = f"{name.rpartition('.')[0]}.".lstrip(".")
        return any(key in stage.trainable for key in own) or (
            not own and any(key.startswith(around) for key in stage.trainable)
        )

    return frozenset(name for name in names if not trains(name))
