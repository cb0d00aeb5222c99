"""torchvision's classification models by name, at an image size that they can take.

Order: `build` -> `head.find_heads` -> `head.replace_head` -> `weights.load_weights`.
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
from trainer.model.weights import find_enum, is_file

_NUM_CLASSES = 1000  # as the published weights have it
_LARGEST_SIDE = 8192
_LARGEST_TRIED = 768
# Inception's auxiliary head ends in a 5 x 5 convolution over maps that smaller pictures do not fill.
_INCEPTION_AUXILIARY_FROM = 299


@dataclass(frozen=True)
class Preset:
    """How pictures are prepared for a model's published weights."""

    image_size: int
    """Side of the square that the model sees, in pixels."""
    resize_size: int
    """Side to which a picture's shorter side is resized before the centre crop, in pixels."""
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Of each channel, for values in [0, 1]."""
    std: tuple[float, float, float]


def preset(name: str, weights: str | None) -> Preset:
    """Return the preprocessing of the model's weights: those named, or the default ones for a file or none.

    Raises:
        UserError: an unknown model, or weights that it does not have.

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
    """Return the model with weights drawn from torch's current random numbers, in train mode, on the CPU.

    Args:
        name: one of `names()`.
        image_size: side of the square pictures in pixels; tried without memory before anything is drawn.
        num_classes: outputs.
        empty: leave the parameters on the meta device: nothing is drawn, and they take no memory.

    Raises:
        UserError: an unknown model, or an image size that it cannot take.

    """
    check_architecture(name)
    reason = _misfit(name, image_size)
    if reason is not None:
        raise UserError(
            f"{name} cannot be trained on images of {image_size} x {image_size} px: {reason}."
            f"{_nearest(name, image_size)}"
        )
    if empty:
        with _without_memory(name):
            return _construct(name, image_size, num_classes)
    return _construct(name, image_size, num_classes)


@contextmanager
def _without_memory(name: str) -> Iterator[None]:
    """Let a block construct the model with parameters on the meta device; random numbers stay."""
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))  # some layers draw before they are emptied
        stack.enter_context(init_empty_weights())
        if name.startswith("vit_"):  # its position embedding may be large; RegNets cannot be built this way
            stack.enter_context(torch.device("meta"))
        yield


def _construct(name: str, image_size: int, num_classes: int) -> nn.Module:
    settings: dict[str, Any] = {"weights": None, "num_classes": num_classes}
    # Three families take settings of their own; the others find out the size of their input as they run.
    if name.startswith("vit_"):
        settings["image_size"] = image_size
    elif name.startswith("maxvit_"):
        settings["input_size"] = (image_size, image_size)
    elif name in ("googlenet", "inception_v3"):
        # Built as their published weights were. init_weights=False leaves torch's own, much faster start.
        has_auxiliary = name == "googlenet" or image_size >= _INCEPTION_AUXILIARY_FROM
        settings |= {"aux_logits": has_auxiliary, "transform_input": True, "init_weights": False}
    return models.get_model(name, **settings)


@lru_cache(maxsize=256)
def _misfit(name: str, image_size: int) -> str | None:
    """Return why the model cannot take such images, or None where it can."""
    if not 1 <= image_size <= _LARGEST_SIDE:
        return f"a side has 1 to {_LARGEST_SIDE} pixels"
    if name.startswith("vit_") and image_size % (patch := _patch_size(name)):
        return f"its patches are {patch} x {patch} px, and the side must be a multiple of that"
    try:
        with _without_memory(name):
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
    size = preset(name, None).image_size
    with _without_memory(name):
        return cast(int, _construct(name, size, _NUM_CLASSES).patch_size)


def _nearest(name: str, image_size: int) -> str:
    """Return a sentence with sizes near `image_size` that the model can take."""
    step = _patch_size(name) if name.startswith("vit_") else 32
    at = min(max(image_size, 0), _LARGEST_SIDE)
    smaller = range(at - at % step, 0, -step)
    larger = range(at - at % step + step, min(max(_LARGEST_TRIED, at + step), _LARGEST_SIDE) + 1, step)
    fitting = [
        next((s for s in sizes if s != image_size and _misfit(name, s) is None), None)
        for sizes in (smaller, larger)
    ]
    listed = " or ".join(str(size) for size in fitting if size is not None)
    would_do = f" data.image_size {listed} would do;" if listed else ""
    return f"{would_do} its published weights take {preset(name, None).image_size}"
