"""Load a model file, `model.safetensors`: weights, and a header with all that is needed to predict with them.

A file may come from anywhere: nothing in it is executed, and every field and tensor is validated. See `metadata` for
the header.
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
    """Convert an image to the model's input, as the run's evaluation does."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._transform = eval_transform(preprocessing)
        self._normalize = Normalize(preprocessing, torch.device("cpu"))

    def __call__(self, image: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Return float32 [3, image_size, image_size] of a PIL image or of an image file.

        Raises:
            UserError: the image cannot be read.

        """
        try:
            decoded = upright_rgb(image) if isinstance(image, Image.Image) else decode(image)
        except UnreadableImage as error:
            name = "the image" if isinstance(image, Image.Image) else escape_unprintable(os.fspath(image))
            raise UserError(f"{name}: {error}; expected an image file") from None
        array = torch.tensor(to_array(self._transform(decoded)))
        return self._normalize(array.permute(2, 0, 1)[None])[0]


class LoadedModel(NamedTuple):
    """A loaded model file, ready to predict with."""

    model: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Return the model (eval mode, CPU), its preprocessing and its classes; see `regraft.load`."""
    if not Path(path).is_file():
        raise UserError(f"{os.fspath(path)}: there is no such file; expected a run's model.safetensors")
    metadata = read_metadata(path)
    if metadata is None:
        raise UserError(f"{os.fspath(path)}: holds weights but no regraft header; expected a run's model.safetensors")
    size = metadata.preprocessing.image_size
    try:
        # On the meta device: the file's tensors become the model's after they were checked.
        model = build(metadata.architecture, image_size=size, empty=True)
        replace_head(model, find_heads(model, size), len(metadata.classes), "torch")
        state = read_state(path, model.state_dict())
    except UserError as error:
        raise UserError(f"{os.fspath(path)}: {error}") from None
    model.load_state_dict(state, assign=True)
    return LoadedModel(model.eval(), Preprocess(metadata.preprocessing), metadata.classes)


def read_state(path: str | os.PathLike[str], expected: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the file's tensors as float32; they must be finite and have the expected names and shapes.

    Raises:
        UserError: the tensors differ from the expected ones, or cannot be read.

    """
    state: dict[str, Tensor] = {}
    try:
        with safe_open(path, framework="pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            wrong = [f"{name} is missing" for name in expected if name not in shapes]
            wrong += [f"{name} does not belong to this model" for name in shapes if name not in expected]
            wrong += [
                f"{name} is {list(shapes[name])}, expected {list(tensor.shape)}"
                for name, tensor in expected.items()
                if name in shapes and shapes[name] != tuple(tensor.shape)
            ]
            for name in [] if wrong else shapes:
                tensor = file.get_tensor(name)
                dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
                # A copy, because the tensor may be a memory map of the file, which may change.
                state[name] = tensor.to(dtype, copy=True)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise UserError(f"cannot be read to its end ({error})") from None
    for name, tensor in state.items():
        if not fits(name, expected[name], tensor):
            wrong.append(f"{name} holds {tensor.dtype}, or indices that differ from this model's")
        elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
            wrong.append(f"{name} holds NaN or infinite values")
    if wrong:
        raise UserError(f"its weights do not fit its header: {join_truncated(wrong, limit=5)}")
    return state
