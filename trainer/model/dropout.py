"""Set the probabilities of dropout and stochastic depth in a model."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.densenet import _DenseLayer
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.googlenet import InceptionAux
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from trainer.errors import UserError


def set_dropout(model: nn.Module, name: str, probability: float) -> str:
    """Set the probability of the model's dropout layers in place; return a line for the console.

    These are the layers that torchvision's argument `dropout` (DenseNet: `drop_rate`) sets, without the attention
    weights of transformers and the auxiliary classifiers of GoogLeNet.

    Raises:
        UserError: the model has no dropout layers.

    """
    auxiliary = {
        id(layer) for module in model.modules() if isinstance(module, InceptionAux) for layer in module.modules()
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
            f"model.dropout is {probability:g}, but {name} has no dropout layers: set it to null. Models with dropout "
            "are AlexNet, DenseNet, EfficientNet, GoogLeNet, Inception, MaxViT, MNASNet, MobileNet, SqueezeNet, Swin, "
            "VGG and ViT"
        )
    return f"dropout {probability:g} in {count} layers"


def set_stochastic_depth(model: nn.Module, name: str, probability: float) -> str:
    """Set the probability with which the last residual block is skipped, in place; return a line for the console.

    torchvision's probabilities grow with the depth (Huang et al. 2016, Deep Networks with Stochastic Depth, eq. 4).
    They are all multiplied by the same factor.

    Raises:
        UserError: the model has no stochastic depth.

    """
    layers = list(_active_stochastic_depth(model))
    greatest = max((layer.p for layer in layers), default=0.0)
    if not greatest:
        raise UserError(
            f"model.stochastic_depth is {probability:g}, but {name} has no stochastic depth: set it to null. "
            "Models with it are ConvNeXt, EfficientNet, MaxViT and Swin"
        )
    for layer in layers:
        layer.p *= probability / greatest
    return f"stochastic depth from {min(layer.p for layer in layers):.3g} to {probability:g} in {len(layers)} layers"


def _active_stochastic_depth(model: nn.Module) -> Iterator[StochasticDepth]:
    """Yield the layers that are called: EfficientNet's blocks without a shortcut have one that they never call."""
    unused = {
        id(module.stochastic_depth)
        for module in model.modules()
        if isinstance(module, MBConv | FusedMBConv) and not module.use_res_connect
    }
    for module in model.modules():
        if isinstance(module, StochasticDepth) and id(module) not in unused:
            yield module
