"""What trains, in stages; and what that means for BatchNorm.

Freezing the lower layers is the strongest regularisation there is (Yosinski et al. 2014); letting them loose one
after the other keeps what they know from the first, large gradients of a new head (Howard & Ruder 2018, ULMFiT).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import nn

from trainer.model.batch_norm import freeze_batch_norm, named_batch_norms, thaw_batch_norm
from trainer.model.blocks import Structure, trained

Policy = Literal["frozen-with-weights", "frozen", "train", "sync"]


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What trains from an epoch on."""

    begins: int
    """The epoch, counted from 0."""
    trains: frozenset[str]
    """Names of parameters."""


def make_stages(
    what: Mapping[int, str] | str, model: nn.Module, heads: Sequence[str], structure: Structure
) -> tuple[Stage, ...]:
    """Return the stages of a run, in their order; what trains in one trains in all that follow.

    Args:
        what: what trains, as `blocks.trained` takes it; or epoch -> that, from 0 on.
        model: with its new output layers.
        heads: their names, which train in every stage.
        structure: of the model.

    Raises:
        UserError: what trains means nothing in this model.

    """
    stages: list[Stage] = []
    so_far: frozenset[str] = frozenset()
    for begins, text in sorted(({0: what} if isinstance(what, str) else what).items()):
        so_far |= trained(text, model, heads, structure)
        stages.append(Stage(begins=begins, trains=so_far))
    return tuple(stages)


def stage_at(stages: Sequence[Stage], epoch: int) -> Stage:
    """Return the stage that an epoch (counted from 0) lies in."""
    return [stage for stage in stages if stage.begins <= epoch][-1]


def enter(model: nn.Module, stage: Stage, policy: Policy) -> None:
    """Have just the stage's parameters train, and BatchNorm's statistics by the policy.

    What does not train needs no gradient: nothing below the first layer that trains is kept for a backward pass.
    A model that DDP has wrapped has to be wrapped again after it.
    """
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in stage.trains)
    frozen = frozen_batch_norms(model, stage, policy)
    for name, layer in named_batch_norms(model):
        if name in frozen:
            freeze_batch_norm(layer)
        else:
            thaw_batch_norm(layer, training=model.training)


def frozen_batch_norms(model: nn.Module, stage: Stage, policy: Policy) -> frozenset[str]:
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
        return any(key in stage.trains for key in own) or (
            not own and any(key.startswith(around) for key in stage.trains)
        )

    return frozenset(name for name in names if not trains(name))
