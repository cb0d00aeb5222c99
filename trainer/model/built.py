"""`BuiltModel`: a model ready to train, the order of its layers, and the stages of gradual unfreezing."""

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
    """Names of the new output layers: the main one, then the auxiliary ones."""
    source: str
    """Where the pretrained weights came from."""
    summary: tuple[str, ...]
    """Lines for the console: what was loaded, replaced and set."""
    layer_order: LayerOrder
    unfreeze_stages: tuple[UnfreezeStage, ...] = ()
    """Stages of gradual unfreezing; the model is in the first one. Empty until they are set."""
