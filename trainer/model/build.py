"""Build models of torchvision and timm by name, for an image size that they can take.

Order: `build` -> `head.find_heads` -> `head.replace_head` -> `load_weights`.
"""

from functools import lru_cache
from typing import Any, cast

from torch import nn
from torchvision import models

from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.model import timm_models
from trainer.model.architectures import check_architecture, is_timm
from trainer.model.head import trial_forward
from trainer.model.meta_device import on_meta_device
from trainer.model.torchvision_weights import find_enum, is_file
from trainer.text import first_line

_NUM_CLASSES = 1000  # of the published weights
_MAX_IMAGE_SIZE = 8192
# Inception's auxiliary head ends in a 5 x 5 convolution, for which the maps of smaller images are too small.
_MIN_INCEPTION_AUXILIARY_SIZE = 299
_MAX_SUGGESTED_SIZE = 768
_MAX_SUGGESTIONS = 4
"""Sizes of timm's models that are tried to suggest one; a trial may take a second."""


def preset(name: str, weights: str | None) -> Preprocessing:
    """Return the preprocessing of published weights: the named ones, or for a file or None the default ones.

    Raises:
        UserError: the model is unknown, or has no such weights.

    """
    check_architecture(name)
    if is_timm(name):
        if weights is None or weights == "DEFAULT" or is_file(weights):
            return timm_models.preset(name)
        raise UserError(
            f"model.weights is {weights!r}, but model.name is {name}: expected DEFAULT, a local file or folder, or "
            f"null for random weights. Name other weights of timm in model.name: {name.partition('.')[0]}.{weights}"
        )
    entry = find_enum(name, "DEFAULT" if weights is None or is_file(weights) else weights)
    transforms = entry.transforms()
    return Preprocessing(
        image_size=int(transforms.crop_size[0]),
        resize_size=int(transforms.resize_size[0]),
        resize="squash",  # as in the D2L recipe: nothing of an image is lost before the center crop
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def build(
    name: str,
    *,
    image_size: int,
    num_classes: int = _NUM_CLASSES,
    empty: bool = False,
    dropout: float | None = None,
    stochastic_depth: float | None = None,
) -> nn.Module:
    """Return the model with random weights, drawn from torch's current random state, in training mode, on the CPU.

    Args:
        name: a model of torchvision, or of timm as `timm/NAME`.
        image_size: side of the square images in pixels; checked by a trial forward before weights are drawn.
        num_classes: number of outputs.
        empty: leave the parameters on the meta device: they take no memory, and no random numbers are drawn.
        dropout: for timm's models, which have such layers only if they are constructed with a probability.
        stochastic_depth: likewise.

    Raises:
        UserError: the model is unknown, cannot take images of this size, or has no dropout or stochastic depth.

    """
    check_architecture(name)
    reason = _why_unsuitable(name, image_size)
    if reason is not None:
        raise UserError(
            f"{name} cannot be trained on images of {image_size} x {image_size} px: {reason}."
            f"{_suggest_sizes(name, image_size)}"
        )
    rates = {"dropout": dropout, "stochastic_depth": stochastic_depth} if is_timm(name) else {}
    return (_construct_empty if empty else _construct)(name, image_size, num_classes, **rates)


def construct_empty(name: str) -> nn.Module:
    """Return the model of the published weights with its parameters on the meta device."""
    return _construct_empty(name, preset(name, None).image_size, _NUM_CLASSES)


def _construct_empty(name: str, image_size: int, num_classes: int, **rates: float | None) -> nn.Module:
    if is_timm(name):
        return timm_models.construct_empty(name, image_size, num_classes, **rates)
    with on_meta_device(name):
        return _construct(name, image_size, num_classes)


def _construct(name: str, image_size: int, num_classes: int, **rates: float | None) -> nn.Module:
    if is_timm(name):
        return timm_models.construct(name, image_size, num_classes, **rates)
    options: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    # Three families have options of their own; the others take the size of their input from the input.
    if name.startswith("vit_"):
        options["image_size"] = image_size
    elif name.startswith("maxvit_"):
        options["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        # Options of the published weights. init_weights=False keeps torch's default, which is much faster.
        has_auxiliary = name == "googlenet" or image_size >= _MIN_INCEPTION_AUXILIARY_SIZE
        options |= {"aux_logits": has_auxiliary, "transform_input": True, "init_weights": False}
    return models.get_model(name, **options)


@lru_cache(maxsize=256)
def _why_unsuitable(name: str, image_size: int) -> str | None:
    """Return why the model cannot take such images, or None if it can."""
    if not 1 <= image_size <= _MAX_IMAGE_SIZE:
        return f"expected 1 to {_MAX_IMAGE_SIZE} px"
    if name.startswith("vit_") and image_size % (patch := _patch_size(name)):
        return f"its patches are {patch} x {patch} px, and the image size must be a multiple of {patch}"
    try:
        model = _construct_empty(name, image_size, _NUM_CLASSES)
    except (ValueError, RuntimeError, AssertionError, UserError) as error:
        return first_line(error.__cause__ or error).rstrip(".")
    try:
        trial_forward(model, image_size)
    except UserError as error:
        return first_line(error.__cause__ or error).rstrip(".")
    return None


def _patch_size(name: str) -> int:
    """Return the side of the patches of torchvision's ViT in pixels."""
    return cast(int, construct_empty(name).patch_size)


def _suggest_sizes(name: str, image_size: int) -> str:
    """Return a sentence with the nearest suitable sizes, and that of the published weights."""
    published = preset(name, None).image_size
    if is_timm(name):
        step, most = timm_models.size_step(name), _MAX_SUGGESTIONS
    else:
        step, most = _patch_size(name) if name.startswith("vit_") else 32, None
    clamped = min(max(image_size, 0), _MAX_IMAGE_SIZE)
    below = clamped - clamped % step
    larger_end = min(max(_MAX_SUGGESTED_SIZE, clamped + step), _MAX_IMAGE_SIZE) + 1
    suitable = [
        next((size for size in sizes if size != image_size and _why_unsuitable(name, size) is None), None)
        for sizes in (range(below, 0, -step)[:most], range(below + step, larger_end, step)[:most])
    ]
    sizes = " or ".join(str(size) for size in suitable if size is not None)
    suggestion = f" Set data.image_size to {sizes};" if sizes else ""
    return f"{suggestion} its published weights take {published}"
