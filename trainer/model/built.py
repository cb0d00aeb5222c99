"""`BuiltModel`: a model ready to train, and what is known about it."""

from dataclasses import dataclass

from torch import nn

from trainer.model.blocks import LayerOrder
from trainer.model.freeze import UnfreezeStage


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
