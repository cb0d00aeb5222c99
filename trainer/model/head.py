"""Find a model's output layers by trial forwards, and replace them by layers for other classes.

Order: `build` -> `find_heads` -> `replace_head` -> `load_weights`. Trial forwards run on the meta device: they
take no memory, and leave parameters, buffers, modes and random numbers unchanged.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.overrides import TorchFunctionMode
from torchvision.models import GoogLeNetOutputs, InceptionOutputs

from trainer.errors import UserError
from trainer.text import first_line

# Weights of the auxiliary losses. GoogLeNet: Szegedy et al. 2014, section 5. Inception v3: the value that torchvision
# and PyTorch's transfer-learning tutorial train it with.
GOOGLENET_AUXILIARY = 0.3
INCEPTION_AUXILIARY = 0.4


@dataclass(frozen=True)
class Head:
    """An output layer."""

    name: str
    """Dotted name, as in `model.named_modules()`."""
    activations: tuple[str, ...] = ()
    """Names of ReLU modules between the layer and the output, as SqueezeNet has one: logits must not be clipped."""


def trial_forward(model: nn.Module, image_size: int, *, shapes: Mapping[str, tuple[int, ...]] | None = None) -> Any:
    """Return a model's outputs for float [2, 3, image_size, image_size] in training mode, on the meta device.

    Args:
        model: unchanged; its forward hooks run.
        image_size: side of the images in pixels.
        shapes: parameter name -> another shape for this forward.

    Raises:
        UserError: the model cannot take such images.

    """
    meta_tensors: dict[int, Tensor] = {}
    tensors: dict[str, Tensor] = {}
    # A module that is used under several names is listed once: functional_call would restore its parameters once only.
    for prefix, module in model.named_modules():
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is None:
                continue
            name = f"{prefix}.{key}" if prefix else key
            if id(tensor) not in meta_tensors:
                shape = (shapes or {}).get(name, tuple(tensor.shape))
                meta_tensors[id(tensor)] = torch.empty(shape, dtype=tensor.dtype, device="meta")
            tensors[name] = meta_tensors[id(tensor)]
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    modes = {module: module.training for module in model.modules()}
    with ExitStack() as stack:
        # Tensors that forward itself creates must be on the meta device too.
        for context in (torch.random.fork_rng(devices=[]), torch.no_grad(), torch.device("meta"), _EmptyOutputs()):
            stack.enter_context(context)
        try:
            for module in modes:
                module.training = True
            images = torch.empty(2, 3, image_size, image_size, dtype=dtype, device="meta")
            return functional_call(model, tensors, (images,), tie_weights=False)
        except Exception as error:  # a model's code may raise anything
            raise UserError(
                f"{type(model).__name__} cannot take images of {image_size} x {image_size} px: {first_line(error)}"
            ) from error
        finally:
            for module, mode in modes.items():
                module.training = mode


class _EmptyOutputs(TorchFunctionMode):
    """Return empty outputs of functions whose implementation on the meta device takes most of a trial forward."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is nn.functional.batch_norm:
            inputs, running_mean = args[:2]
            if running_mean is not None and len(running_mean) != inputs.shape[1]:
                raise RuntimeError(f"batch_norm of {len(running_mean)} channels on {inputs.shape[1]} channels")
            return torch.empty_like(inputs)
        if function is nn.functional.layer_norm:
            inputs, shape = args[:2]
            if inputs.shape[-len(shape) :] != tuple(shape):
                raise RuntimeError(f"layer_norm of shape {list(shape)} on inputs {list(inputs.shape)}")
            return torch.empty_like(inputs)
        if function is nn.functional.gelu:
            return torch.empty_like(args[0])
        return function(*args, **(kwargs or {}))


def split_outputs(outputs: Any) -> tuple[Tensor, tuple[tuple[float, Tensor], ...]]:
    """Return (logits [B, K], ((weight of the loss, auxiliary logits [B, K]), ...)) of a model's outputs.

    Raises:
        UserError: the outputs are neither a tensor nor those of GoogLeNet or Inception.

    """
    if isinstance(outputs, Tensor):
        return outputs, ()
    if isinstance(outputs, GoogLeNetOutputs):
        both = ((GOOGLENET_AUXILIARY, outputs.aux_logits1), (GOOGLENET_AUXILIARY, outputs.aux_logits2))
        return outputs.logits, tuple((weight, logits) for weight, logits in both if logits is not None)
    if isinstance(outputs, InceptionOutputs):
        auxiliary = outputs.aux_logits
        return outputs.logits, () if auxiliary is None else ((INCEPTION_AUXILIARY, auxiliary),)
    raise UserError(
        f"the model returns {type(outputs).__name__}; expected logits [B, classes], or the outputs of "
        "torchvision's GoogLeNet or Inception: classification models only"
    )


def find_heads(model: nn.Module, image_size: int) -> tuple[Head, ...]:
    """Return the main output layer, then the auxiliary ones, in the order of the outputs.

    An output layer is the one Linear or Conv2d that decides alone how many logits an output has: with twice as many
    outputs of the layer, there are twice as many logits. If no layer does so alone, several layers that do so together
    are returned, such as the two of a distilled model, whose logits are averaged. Where timm names a model's classifier
    (`get_classifier`), only the layers in it are considered.

    Raises:
        UserError: an output has no such layer, or the model cannot take images of this size.

    """
    calls: list[str] = []
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(_recorder(calls, name)).remove)
        outputs = _all_outputs(trial_forward(model, image_size))
    count, classifier = outputs[0].shape[-1], _names_in_classifier(model)
    candidates = [name for name in dict.fromkeys(calls) if _has_outputs(model.get_submodule(name), count)]
    in_classifier = [name for name in candidates if name in classifier]
    for names in filter(None, (in_classifier, candidates)):
        heads = _heads_among(names, model, image_size, outputs)
        if heads:
            break
    else:
        raise UserError(
            f"{type(model).__name__} has no output layer that can be replaced: expected a Linear or Conv2d layer that "
            "alone decides the number of logits"
        )
    after_main = calls[calls.index(heads[0]) + 1 :]
    relus = tuple(name for name in after_main if isinstance(model.get_submodule(name), nn.ReLU))
    return Head(heads[0], relus), *map(Head, heads[1:])


def _has_outputs(layer: nn.Module, count: int) -> bool:
    return isinstance(layer, nn.Linear | nn.Conv2d) and len(layer.weight) == count


def _names_in_classifier(model: nn.Module) -> frozenset[str]:
    """Return the names of the modules of a timm model's classifier, which may be several modules."""
    get_classifier: Any = getattr(model, "get_classifier", None)
    classifier = get_classifier() if callable(get_classifier) else ()
    parts = classifier if isinstance(classifier, tuple | list) else (classifier,)
    modules = {id(module) for part in parts if isinstance(part, nn.Module) for module in part.modules()}
    return frozenset(name for name, module in model.named_modules() if id(module) in modules)


def _heads_among(names: Sequence[str], model: nn.Module, image_size: int, outputs: Sequence[Tensor]) -> list[str]:
    """Return a layer for each output; or for a single output, all layers if they decide together; or nothing."""
    layers: list[str | None] = [None] * len(outputs)
    for name in names:
        for i in _doubled_outputs((name,), model, image_size, outputs):
            layers[i] = name
    if None not in layers:
        return cast(list[str], layers)
    if len(outputs) == 1 and len(names) > 1 and _doubled_outputs(names, model, image_size, outputs):
        return list(names)
    return []


def _doubled_outputs(
    names: Sequence[str], model: nn.Module, image_size: int, outputs: Sequence[Tensor]
) -> Sequence[int]:
    """Return the indices of the outputs that have twice as many logits if each of the layers has twice as many."""
    shapes = {
        f"{name}.{key}": (2 * len(parameter), *parameter.shape[1:])
        for name in names
        for key, parameter in model.get_submodule(name).named_parameters(recurse=False)
    }
    try:
        changed = _all_outputs(trial_forward(model, image_size, shapes=shapes))
    except UserError:  # another layer needs the outputs of these
        return ()
    pairs = enumerate(zip(outputs, changed, strict=True))
    return [i for i, (before, after) in pairs if tuple(after.shape) == (2, 2 * before.shape[-1])]


def _recorder(calls: list[str], name: str) -> Callable[..., None]:
    return lambda module, args, output: calls.append(name)


def _all_outputs(outputs: Any) -> list[Tensor]:
    logits, auxiliary = split_outputs(outputs)
    return [logits, *(other for _, other in auxiliary)]


def replace_head(model: nn.Module, heads: Sequence[Head], num_classes: int, init: Literal["xavier", "torch"]) -> None:
    """Replace each head, in place, by a new layer of the same kind with `num_classes` outputs.

    Activations between a head and the output become identities. `xavier` draws the weight Xavier-uniformly
    (Glorot & Bengio 2010, eq. 16) and leaves the bias to the layer's default; `torch` leaves both to it.
    Draws from torch's current random numbers, head by head.

    Raises:
        UserError: `num_classes` is not positive.

    """
    if num_classes < 1:
        raise UserError(f"a head needs at least one output, not {num_classes}")
    for head in heads:
        old = cast(nn.Linear | nn.Conv2d, model.get_submodule(head.name))
        new = _new_layer(old, num_classes)
        if init == "xavier":
            nn.init.xavier_uniform_(new.weight)
        model.set_submodule(head.name, new.train(old.training))
        for name in head.activations:
            model.set_submodule(name, nn.Identity())
    if hasattr(model, "num_classes"):  # torchvision and timm note the number of classes beside the layer
        model.num_classes = num_classes  # type: ignore[assignment]


def _new_layer(old: nn.Linear | nn.Conv2d, num_classes: int) -> nn.Linear | nn.Conv2d:
    options: dict[str, Any] = {"bias": old.bias is not None, "device": old.weight.device, "dtype": old.weight.dtype}
    if isinstance(old, nn.Linear):
        return nn.Linear(old.in_features, num_classes, **options)
    for name in ("kernel_size", "stride", "padding", "dilation", "padding_mode"):
        options[name] = getattr(old, name)
    return nn.Conv2d(old.in_channels, num_classes, **options)
