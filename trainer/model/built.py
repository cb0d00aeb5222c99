"""`BuiltModel`: a model ready to train, its layers in execution order, and what trains in each stage."""

from dataclasses import dataclass

from torch import nn

from trainer.model.blocks import LayerOrder


@dataclass(frozen=True, kw_only=True)
class UnfreezeStage:
    """The parameters that train from an epoch on."""

    start_epoch: int
    """First epoch of the stage, counted from 0."""
    trainable: frozenset[str]
    """Names of the parameters."""


@dataclass(frozen=True)
class BuiltModel:
    """A model ready to train."""

    model: nn.Module
    heads: tuple[str, ...]
    """Dotted names of the new output layers, auxiliary ones included."""
    source: str
    """Where the pretrained weights came from."""
    summary: tuple[str, ...]
    """Lines that say what was done, for the console."""
    layer_order: LayerOrder
    unfreeze_stages: tuple[UnfreezeStage, ...] = ()
    """Stages of gradual unfreezing; the model is in the first of them. Empty if all parameters train."""
