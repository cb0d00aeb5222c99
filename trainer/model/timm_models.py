"""Construct timm's models, and read their preprocessing and classes from timm's tables."""

import copy
import math
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models import ResNet18_Weights

from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.model.encoder_classifier import with_classifier
from trainer.model.meta_device import on_meta_device

_UNSET = 113
"""Value that marks a buffer as not computed yet."""


def _model(name: str) -> str:
    """Return timm's name of `timm/NAME`."""
    return name.removeprefix("timm/")


def pretrained_cfg(name: str) -> Any:
    """Return timm's description of a model's published weights, a `PretrainedCfg`, for `timm/NAME` or `timm/NAME.TAG`.

    Without a tag, these are timm's default weights of the model.
    """
    import timm  # noqa: PLC0415 (an optional package: `check_architecture` comes first)

    return timm.get_pretrained_cfg(_model(name)) or timm.models.PretrainedCfg()


def preset(name: str) -> Preprocessing:
    """Return the preprocessing of the model's published weights.

    Raises:
        UserError: regraft does not have this preprocessing.

    """
    cfg = pretrained_cfg(name)
    image_size = min(cfg.input_size[1:])
    if cfg.input_size[0] != 3 or cfg.interpolation not in ("bilinear", "bicubic"):
        raise UserError(
            f"{name} expects images of {cfg.input_size[0]} channels, {cfg.interpolation}: expected 3 channels, and "
            "bilinear or bicubic interpolation. Choose another model"
        )
    return Preprocessing(
        image_size=image_size,
        resize_size=math.floor(image_size / cfg.crop_pct),
        resize="squash" if cfg.crop_mode == "squash" else "shorter",
        interpolation=cfg.interpolation,
        mean=tuple(cfg.mean),
        std=tuple(cfg.std),
    )


def construct(
    name: str, image_size: int, num_classes: int, *, dropout: float | None = None, stochastic_depth: float | None = None
) -> nn.Module:
    """Return the model with random weights. A feature model gets timm's classifier of its family, or a linear layer.

    Raises:
        UserError: the model has no such option as `drop_rate` or `drop_path_rate`.

    """
    import timm  # noqa: PLC0415 (an optional package: `check_architecture` comes first)

    options: dict[str, Any] = {"num_classes": num_classes}
    if pretrained_cfg(name).fixed_input_size:  # the others take images of any size
        options["img_size"] = image_size
    rates = {"drop_rate": dropout, "drop_path_rate": stochastic_depth}
    options |= {key: rate for key, rate in rates.items() if rate is not None}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about functions of torch that timm should no longer call
        try:
            return with_classifier(timm.create_model(_model(name), pretrained=False, **options), num_classes)
        except Exception as error:  # a model's code may raise anything, such as an AssertionError about the image size
            for option, key in (("model.dropout", "drop_rate"), ("model.stochastic_depth", "drop_path_rate")):
                if key in options and isinstance(error, TypeError) and f"'{key}'" in str(error):
                    raise UserError(f"{option} is {options[key]:g}, but {name} has none: set it to null") from error
            raise UserError(f"timm cannot create {_model(name)} ({type(error).__name__}: {error})") from error


def construct_empty(name: str, image_size: int, num_classes: int, **rates: float | None) -> nn.Module:
    """Return the model as `construct` does, with its parameters on the meta device.

    Buffers that a checkpoint does not contain, such as Swin's attention masks, have their values. Others may be on the
    meta device.
    """
    try:
        with on_meta_device(name):
            model = construct(name, image_size, num_classes, **rates)
    except UserError:  # it computes with its parameters, so that all of its tensors have to be on one device
        with on_meta_device(name), torch.device("meta"):
            model = construct(name, image_size, num_classes, **rates)
    if on_meta := _constants_on_meta_device(model):
        computed = _compute_constants(model, on_meta)
        if computed is None:
            with torch.random.fork_rng(devices=[]):
                full = construct(name, image_size, num_classes, **rates)
            computed = {buffer: full.get_buffer(buffer) for buffer in on_meta}
        for buffer, tensor in computed.items():
            owner, _, key = buffer.rpartition(".")
            model.get_submodule(owner)._buffers[key] = tensor
    return model


def _constants_on_meta_device(model: nn.Module) -> list[str]:
    """Return the names of the buffers on the meta device that a state dict does not contain."""
    persistent = model.state_dict()
    return [name for name, buffer in model.named_buffers() if buffer.is_meta and name not in persistent]


def _compute_constants(model: nn.Module, names: Sequence[str]) -> dict[str, Tensor] | None:
    """Return these buffers as timm computes them, on the CPU, or None if it does not compute all of them anew."""
    from timm.models._manipulate import reinit_non_persistent_buffers  # noqa: PLC0415 (an optional package)

    copied = copy.deepcopy(model).to_empty(device="cpu")  # its parameters are never written, and take no memory
    unset = {name: copied.get_buffer(name).fill_(_UNSET).clone() for name in names}
    reinit_non_persistent_buffers(copied)
    computed = {name: copied.get_buffer(name) for name in names}
    return None if any(torch.equal(computed[name], unset[name]) for name in names) else computed


def size_step(name: str) -> int:
    """Return a number of pixels whose multiples are likely image sizes: the side of large patches, or 32."""
    size = pretrained_cfg(name).input_size[-1]
    return next((step for step in (32, 14, 16) if size % step == 0), 32)


def class_names(name: str, rows: int) -> tuple[tuple[str, ...], str]:
    """Return (names of the classes of timm's weights in the order of the rows, where they come from).

    Raises:
        UserError: no set of classes with so many rows is known.

    """
    if rows == len(ResNet18_Weights.DEFAULT.meta["categories"]):
        return tuple(ResNet18_Weights.DEFAULT.meta["categories"]), "ImageNet-1k"
    from timm.data import ImageNetInfo, infer_imagenet_subset  # noqa: PLC0415 (an optional package)

    subset = infer_imagenet_subset({"num_classes": rows})
    if subset is None:
        raise UserError(
            f"the output layer of the weights of {name} has {rows} rows, which is not the number of classes of a known "
            "data set: set model.source_labels to a text file with their names, one per line in the order of the rows"
        )
    descriptions = ImageNetInfo(subset).label_descriptions()
    first = [description.split(",")[0].strip() for description in descriptions]
    counts = Counter(first)  # several synsets may have the same first name, such as "crane"
    names = (short if counts[short] == 1 else long for short, long in zip(first, descriptions, strict=True))
    return tuple(names), subset
