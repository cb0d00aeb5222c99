"""Store frozen weights in bfloat16, which is half of their memory.

In precision bf16, autocast rounds the weights of these layers to bfloat16 in each forward pass. A frozen layer whose
weights are stored so computes the same bits.
"""

import torch
from torch import nn

from trainer.model.autocast import autocast_layers


def store_frozen_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Store the frozen weights of a model in a dtype, and those that train in float32.

    Parameters stay the same objects, so an optimizer may hold them. Those of norms, embeddings and layers that are not
    among `autocast_layers` stay in float32.
    """
    for layer in autocast_layers(model):
        for parameter in layer.parameters(recurse=False):
            stored = torch.float32 if parameter.requires_grad else dtype
            if parameter.dtype != stored:
                parameter.data = parameter.data.to(stored)
