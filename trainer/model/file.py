"""`model.safetensors`: weights, and in its header all that is needed to predict with them.

The header's entry `regraft` is JSON: format, version, architecture, classes, preprocessing, source, metrics.
A file from elsewhere is hostile until checked: nothing in it is executed, every field is validated.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from trainer.data.augment import Normalize, Preprocessing, eval_transform, to_array
from trainer.data.decode import UnreadableImage, decode, upright_rgb
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.head import find_heads, replace_head
from trainer.model.metadata import read_metadata
from trainer.model.weights import fits
from trainer.text import escape_unprintable, join_truncated


class Preprocess:
    """A picture -> the model's input, as in the run's evaluation."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._transform = eval_transform(preprocessing)
        self._normalize = Normalize(preprocessing, torch.device("cpu"))

    def __call__(self, picture: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Return float32 [3, image_size, image_size]; a PIL picture is read as its file would be.

        Raises:
            UserError: not a readable image.

        """
        try:
            image = upright_rgb(picture) if isinstance(picture, Image.Image) else decode(picture)
        except UnreadableImage as error:
            name = (
                "the picture" if isinstance(picture, Image.Image) else escape_unprintable(os.fspath(picture))
            )
            raise UserError(f"{name}: {error}; expected an image file") from None
        array = torch.tensor(to_array(self._transform(image)))
        return self._normalize(array.permute(2, 0, 1)[None])[0]


class LoadedModel(NamedTuple):
    """A model file, ready to predict with."""

    model: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Return the model (eval mode, CPU), its preprocessing and its classes; see `regraft.load`."""
    if not Path(path).is_file():
        raise UserError(f"{os.fspath(path)}: there is no such file; expected a run's model.safetensors")
    found = read_metadata(path)
    if found is None:
        raise UserError(
            f"{os.fspath(path)}: holds weights but not regraft's description; "
            "expected a run's model.safetensors"
        )
    size = found.preprocessing.image_size
    try:
        # Without memory or random numbers: the file's tensors become the model's once they are known to fit.
        model = build(found.architecture, image_size=size, empty=True)
        replace_head(model, find_heads(model, size), len(found.classes), "torch")
        state = read_state(path, model.state_dict())
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None
    model.load_state_dict(state, assign=True)
    return LoadedModel(model.eval(), Preprocess(found.preprocessing), found.classes)


def read_state(path: str | os.PathLike[str], wanted: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors, float32 and finite, if they are those of the model, by name and shape.

    Raises:
        UserError: they are not, or cannot be read.

    """
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wrong = [f"{name} is missing" for name in wanted if name not in shapes]
            wrong += [f"{name} is not of this model" for name in shapes if name not in wanted]
            wrong += [
                f"{name} is {list(shapes[name])}, expected {list(tensor.shape)}"
                for name, tensor in wanted.items()
                if name in shapes and shapes[name] != tuple(tensor.shape)
            ]
            for name in [] if wrong else shapes:
                tensor = file.get_tensor(name)
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                # A copy: what is read may be a window on the file, which may change.
                state[name] = tensor.to(dtype, copy=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"not readable to its end ({error})") from None
    for name, tensor in state.items():
        if not fits(name, wanted[name], tensor):
            wrong.append(f"{name} holds {tensor.dtype}, or indices of another model")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            wrong.append(f"{name} holds NaN or infinite values")
    if wrong:
        raise UserError(f"its weights do not fit its description: {join_truncated(wrong, limit=5)}")
    return state
