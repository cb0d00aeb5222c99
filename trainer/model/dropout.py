"""Set the probabilities of dropout and stochastic depth in a model."""

from collections.abc import Iterator

from torch import nn
from torchvision.models.densenet import _DenseLayer
from torchvision.models.efficientnet import FusedMBConv, MBConv
from torchvision.models.googlenet import InceptionAux
from torchvision.models.swin_transformer import ShiftedWindowAttention
from torchvision.ops import StochasticDepth

from trainer.errors import UserError
from trainer.model.architectures import is_timm


def set_dropout(model: nn.Module, name: str, probability: float) -> str:
    """Set the probability of the model's dropout layers in place; return a line for the console.

    timm's models were built with it (`drop_rate`), which sets the layer before the output layer. In torchvision's
    models, these are the layers that the argument `dropout` (DenseNet: `drop_rate`) sets, without the attention weights
    of transformers and the auxiliary classifiers of GoogLeNet.

    Raises:
        UserError: the model has no dropout layers.

    """
    if is_timm(name):
        layers = [module for module in model.modules() if isinstance(module, nn.Dropout) and module.p == probability]
        if probability and not layers and getattr(model, "drop_rate", 0.0) != probability:  # used by a function
            raise UserError(f"model.dropout is {probability:g}, but {name} has no dropout layers: set it to null")
        return f"dropout {probability:g} before the output layer"
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

    The probabilities grow with the depth (Huang et al. 2016, Deep Networks with Stochastic Depth, eq. 4). timm's models
    were built with it (`drop_path_rate`). torchvision's probabilities are all multiplied by the same factor.

    Raises:
        UserError: the model has no stochastic depth.

    """
    if is_timm(name):
        rates = [float(rate) for module in model.modules() if (rate := getattr(module, "drop_prob", 0.0))]
        if probability and not rates:
            raise UserError(
                f"model.stochastic_depth is {probability:g}, but {name} has no stochastic depth: set it to null"
            )
        return f"stochastic depth up to {max(rates, default=0.0):.3g} in {len(rates)} layers"
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
