"""Find torchvision's pretrained weights by name, and tell a name from the path of a file."""

import os
import re
from pathlib import Path
from urllib.parse import urlparse

import torch
from torchvision.models import WeightsEnum, get_model_weights

from trainer.errors import UserError

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".json")
"""Endings that make a text without a folder the name of a file; any other file needs its folder, such as ./NAME."""
_URL = re.compile(r"[a-z][\w+.-]+:/|(hf[_-]hub|hf|hub|timm):", re.IGNORECASE)
_NAME = re.compile(r"(\w+_Weights\.)?(DEFAULT|IMAGENET1K_\w+)")


def is_file(weights: str) -> bool:
    """Return whether `weights` is a local file or folder rather than a name of torchvision's weights."""
    return weights.lower().endswith(SUFFIXES) or "/" in weights or os.sep in weights


def is_torchvision_name(weights: str) -> bool:
    """Return whether `weights` has the form of a name of torchvision's weights."""
    return _NAME.fullmatch(weights) is not None


def file_path(weights: str) -> Path:
    """Return the path of a local file or folder of weights.

    Raises:
        UserError: it is a URL or an identifier of a model hub, or it is in the home folder of an unknown user.

    """
    if _URL.match(weights):
        raise UserError(
            f"model.weights is {weights}: expected a local file or folder; download it first, and give its path"
        )
    try:
        return Path(weights).expanduser()
    except RuntimeError as error:
        raise UserError(f"model.weights is {weights}: {str(error).rstrip('.')}; expected a local file") from None


def find_enum(name: str, weights: str) -> WeightsEnum:
    """Return torchvision's enum member of the model `name` for weights such as `DEFAULT` or `IMAGENET1K_V1`.

    Raises:
        UserError: the model has no such weights.

    """
    entries = get_model_weights(name)
    entry = entries.__members__.get(weights.removeprefix(f"{entries.__name__}."))
    if entry is None:
        here = f". For the file or folder here, write ./{weights}" if weights and os.path.lexists(weights) else ""
        raise UserError(
            f"{name} has no weights {weights!r}; expected one of {', '.join(entries.__members__)}, a local "
            f"file or folder that exists, or null for random weights{here}"
        )
    return entry


def cache_path(entry: WeightsEnum) -> Path:
    """Return the path at which torch.hub caches torchvision's weights."""
    return Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(entry.url).path).name
