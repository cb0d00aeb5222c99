"""The layers whose weights autocast casts to its dtype in each forward pass."""

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import nn

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def autocast_layers(model: nn.Module) -> Iterator[nn.Module]:
    """Yield the layers whose own parameters only enter operations that autocast casts the inputs of.

    Subclasses are left out: they may compute with their parameters before, as convolutions with weight standardization.
    So is nn.MultiheadAttention, whose fast path in evaluation depends on the dtype of its weights.
    """
    return (module for module in model.modules() if type(module) in _LAYERS)


def with_cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model with the weights that autocast would cast in each forward pass cast once.

    It shares all other tensors with the model. Its weights cannot be trained.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    cast = copy.deepcopy(model, shared)
    for layer in autocast_layers(cast):
        for name, parameter in layer.named_parameters(recurse=False):
            layer.register_parameter(name, nn.Parameter(parameter.detach().to(dtype), requires_grad=False))
    return cast
