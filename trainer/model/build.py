"""Build torchvision's classification models by name, for an image size that they can take.

Order: `build` -> `head.find_heads` -> `head.replace_head` -> `load_weights`.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import torch
from accelerate import init_empty_weights
from torch import nn
from torchvision import models

from trainer.errors import UserError
from trainer.model.architectures import check_architecture
from trainer.model.head import trial_forward
from trainer.model.torchvision_weights import find_enum, is_file

_NUM_CLASSES = 1000  # of the published weights
_MAX_IMAGE_SIZE = 8192
_MAX_SUGGESTED_SIZE = 768
# Inception's auxiliary head ends in a 5 x 5 convolution, for which the maps of smaller images are too small.
_MIN_INCEPTION_AUXILIARY_SIZE = 299


@dataclass(frozen=True)
class Preset:
    """Preprocessing of a model's published weights."""

    image_size: int
    """Side of the model's square input in pixels."""
    resize_size: int
    """Size in pixels to which the shorter side of an image is resized before the center crop."""
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel."""


def preset(name: str, weights: str | None) -> Preset:
    """Return the preprocessing of published weights: the named ones, or for a file or None the default ones.

    Raises:
        UserError: the model is unknown, or has no such weights.

    """
    check_architecture(name)
    entry = find_enum(name, "DEFAULT" if weights is None or is_file(weights) else weights)
    transforms = entry.transforms()
    return Preset(
        image_size=int(transforms.crop_size[0]),
        resize_size=int(transforms.resize_size[0]),
        interpolation=transforms.interpolation.value,
        mean=tuple(transforms.mean),
        std=tuple(transforms.std),
    )


def build(name: str, *, image_size: int, num_classes: int = _NUM_CLASSES, empty: bool = False) -> nn.Module:
    """Return the model with random weights, drawn from torch's current random state, in training mode, on the CPU.

    Args:
        name: one of `architectures()`.
        image_size: side of the square images in pixels; checked by a trial forward before weights are drawn.
        num_classes: number of outputs.
        empty: leave the parameters on the meta device: they take no memory, and no random numbers are drawn.

    Raises:
        UserError: the model is unknown, or cannot take images of this size.

    """
    check_architecture(name)
    reason = _why_unsuitable(name, image_size)
    if reason is not None:
        raise UserError(
            f"{name} cannot be trained on images of {image_size} x {image_size} px: {reason}."
            f"{_suggest_sizes(name, image_size)}"
        )
    if empty:
        with _on_meta_device(name):
            return _construct(name, image_size, num_classes)
    return _construct(name, image_size, num_classes)


def construct_empty(name: str) -> nn.Module:
    """Return the model of the published weights with its parameters on the meta device."""
    with _on_meta_device(name):
        return _construct(name, preset(name, None).image_size, _NUM_CLASSES)


@contextmanager
def _on_meta_device(name: str) -> Iterator[None]:
    """Construct models with parameters on the meta device within a block; the random state is restored at its end."""
    with ExitStack() as stack:
        # Some layers draw random numbers before their parameters are moved.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(init_empty_weights())
        # The position embedding may be large. RegNets cannot be constructed in this context.
        if name.startswith("vit_"):
            stack.enter_context(torch.device("meta"))
        yield


def _construct(name: str, image_size: int, num_classes: int) -> nn.Module:
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
        with _on_meta_device(name):
            model = _construct(name, image_size, _NUM_CLASSES)
    except (ValueError, RuntimeError, AssertionError) as error:
        return _first_line(error)
    try:
        trial_forward(model, image_size)
    except UserError as error:
        return _first_line(error.__cause__ or error)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _patch_size(name: str) -> int:
    return cast(int, construct_empty(name).patch_size)


def _suggest_sizes(name: str, image_size: int) -> str:
    """Return a sentence with the nearest suitable sizes, and that of the published weights."""
    step = _patch_size(name) if name.startswith("vit_") else 32
    clamped = min(max(image_size, 0), _MAX_IMAGE_SIZE)
    below = clamped - clamped % step
    larger_end = min(max(_MAX_SUGGESTED_SIZE, clamped + step), _MAX_IMAGE_SIZE) + 1
    suitable = [
        next((size for size in sizes if size != image_size and _why_unsuitable(name, size) is None), None)
        for sizes in (range(below, 0, -step), range(below + step, larger_end, step))
    ]
    sizes = " or ".join(str(size) for size in suitable if size is not None)
    suggestion = f" Set data.image_size to {sizes};" if sizes else ""
    return f"{suggestion} its published weights take {preset(name, None).image_size}"
