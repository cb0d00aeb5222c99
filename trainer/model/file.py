"""Load a model file, `model.safetensors`: weights, and a header with all that is needed to predict with them.

A file may come from anywhere: nothing in it is executed, and every field and tensor is validated. See `metadata` for
the header.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from regraft.contract import MODEL
from trainer.errors import UserError
from trainer.model.build import build
from trainer.model.head import find_heads, replace_head
from trainer.model.load_state import load_state
from trainer.model.load_weights import fits
from trainer.model.metadata import ModelMetadata, read_metadata
from trainer.text import escape_unprintable, join_truncated

_EXPECTED = "expected a run folder or its model.safetensors"


@dataclass(frozen=True)
class LoadedModel:
    """Content of a model file."""

    module: nn.Module
    """In eval mode and float32, on the CPU."""
    heads: tuple[str, ...]
    """Names of the output layers: the main one, then the auxiliary ones."""
    metadata: ModelMetadata


def load(path: str | os.PathLike[str]) -> LoadedModel:
    """Return the content of a run folder's model file, or of a model file.

    Raises:
        UserError: there is no such file, regraft did not write it, or its weights do not fit its header.

    """
    file = find_model_file(path)
    metadata = require_metadata(file)
    size = metadata.preprocessing.image_size
    try:
        # On the meta device: the file's tensors become the model's after they were checked.
        model = build(metadata.architecture, image_size=size, empty=True)
        heads = find_heads(model, size)
        replace_head(model, heads, len(metadata.classes), "torch")
        state = read_state(file, model.state_dict())
    except UserError as error:
        raise UserError(f"{file}: {error}") from None
    load_state(model, state, assign=True)
    return LoadedModel(model.eval(), tuple(head.name for head in heads), metadata)


def find_model_file(path: str | os.PathLike[str]) -> Path:
    """Return the model file of a run folder, or the file itself.

    Raises:
        UserError: there is no such file.

    """
    if not isinstance(path, str | os.PathLike):
        raise UserError(f"regraft.load was given a {type(path).__name__}: {_EXPECTED}, as str or Path")
    file, when = Path(path), ""
    try:
        file = file.expanduser()
        if file.is_dir():
            file, when = file / MODEL, ", which it writes after its first epoch"
        is_file = file.is_file()
    except (OSError, RuntimeError) as error:  # no permission, or a misspelled ~user
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{escape_unprintable(str(file))}: cannot be read ({reason}); {_EXPECTED}") from None
    if not is_file:
        raise UserError(f"{escape_unprintable(str(file))}: there is no such file; {_EXPECTED}{when}")
    return file


def require_metadata(file: Path) -> ModelMetadata:
    """Return the header of a model file.

    Raises:
        UserError: the file has none, or it is damaged.

    """
    metadata = read_metadata(file)
    if metadata is None:
        raise UserError(f"{file}: holds weights but no regraft header; {_EXPECTED}")
    return metadata


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
