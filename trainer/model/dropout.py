"""Dropout and stochastic depth of a model, set to other probabilities than its own."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.densenet import _DenseLayer
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.googlenet import InceptionAux
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from trainer.errors import UserError


def set_dropout(model: nn.Module, name: str, probability: float) -> str:
    """Set the probability of the model's dropout layers, in place; returns a line for a person.

    These are the ones that torchvision's own argument `dropout` (DenseNet: `drop_rate`) reaches, Srivastava et al.
    2014: not the attention weights of transformers, nor the auxiliary classifiers of GoogLeNet.

    Raises:
        UserError: the model has none.

    """
    auxiliary = {
        id(part)
        for module in model.modules()
        if isinstance(module, InceptionAux)
        for part in module.modules()
    }
    count = 0
    for module in model.modules():
        if isinstance(module, nn.Dropout) and id(module) not in auxiliary:
            module.p = probability
        elif isinstance(module, ShiftedWindowAttention):
            module.dropout = probability
        elif isinstance(module, _DenseLayer):
            module.drop_rate = probability
        else:
            continue
        count += 1
    if not count:
        raise UserError(
            f"model.dropout is {probability:g}, but {name} has no dropout layers: leave it null. Those with them are "
            "AlexNet, DenseNet, EfficientNet, GoogLeNet, Inception, MaxViT, MNASNet, MobileNet, SqueezeNet, Swin, "
            "VGG and ViT"
        )
    return f"dropout {probability:g} in {count} layers"


def set_stochastic_depth(model: nn.Module, name: str, probability: float) -> str:
    """Set the probability with which the last residual block is left out, in place; returns a line for a person.

    torchvision gives its models probabilities that grow with the depth (Huang et al. 2016, Deep Networks with
    Stochastic Depth, eq. 4): they keep their proportions.

    Raises:
        UserError: the model has none.

    """
    layers = list(_in_use(model))
    greatest = max((layer.p for layer in layers), default=0.0)
    if not greatest:
        raise UserError(
            f"model.stochastic_depth is {probability:g}, but {name} has no blocks that are left out: leave it null. "
            "Those with them are ConvNeXt, EfficientNet, MaxViT and Swin"
        )
    for layer in layers:
        layer.p *= probability / greatest
    return f"stochastic depth from {min(layer.p for layer in layers):.3g} to {probability:g} in {len(layers)} layers"


def _in_use(model: nn.Module) -> Iterator[StochasticDepth]:
    """Yield the layers that do anything: EfficientNet's blocks without a shortcut have one that they never call."""
    unused = {
        id(module.stochastic_depth)
        for module in model.modules()
        if isinstance(module, MBConv | FusedMBConv) and not module.use_res_connect
    }
    for module in model.modules():
        if isinstance(module, StochasticDepth) and id(module) not in unused:
            yield module
