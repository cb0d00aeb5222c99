"""`model.safetensors`: weights, and in its header all that is needed to predict with them.

The header's entry `regraft` is JSON: format, version, architecture, classes, preprocessing, source, metrics.
A file from elsewhere is hostile until checked: nothing in it is executed, every field is validated.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from trainer.data.augment import Normalize, Preprocessing, eval_transform, to_array
from trainer.data.decode import UnreadableImage, decode, upright_rgb
from trainer.errors import UserError
from trainer.model.build import build, names
from trainer.model.head import find_heads, replace_head
from trainer.model.weights import fits
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable, join_truncated

FORMAT = 1
HEADER_KEY = "regraft"


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """What a model file says of itself."""

    version: str
    """regraft's version that wrote it."""
    architecture: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    source: str
    """Where the weights came from before fine-tuning."""
    metrics: Mapping[str, Any]


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


def write_model(path: Path, state: Mapping[str, Tensor], description: ModelMetadata) -> None:
    """Write weights and description into one file, which is whole or absent."""
    fields = {"format": FORMAT, **dataclasses.asdict(description)}
    # In ASCII: a folder's name, so a class's, may hold bytes that no Unicode text has.
    header = {HEADER_KEY: json.dumps(fields), "format": "pt"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # Not by safetensors' own writing, which leaves a file of a random name where it is killed.
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=header)))


def read_metadata(path: str | os.PathLike[str]) -> ModelMetadata | None:
    """Return what a safetensors file says of itself, or None for one that regraft did not write.

    Raises:
        UserError: not a readable safetensors file, or a description that is damaged or of a later format.

    """
    try:
        with safe_open(path, framework="pt") as file:
            text = (file.metadata() or {}).get(HEADER_KEY)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{os.fspath(path)}: not a readable safetensors file ({error})") from None
    if text is None:
        return None
    try:
        return _parse_metadata(json.loads(text))
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error)
        raise UserError(
            f"{os.fspath(path)}: its description is damaged ({escape_unprintable(reason)[:200]}); expected a run's "
            "model.safetensors as it was written"
        ) from None


def _parse_metadata(fields: Any) -> ModelMetadata:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
    classes = fields["classes"]
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise ValueError("classes are not a list of names")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"{len(classes)} classes, {len(set(classes))} different ones; expected two or more")
    if fields["architecture"] not in names():
        raise ValueError(f"architecture {fields['architecture']!r} is not one of torchvision's")
    return ModelMetadata(
        version=str(fields["version"]),
        architecture=fields["architecture"],
        classes=tuple(classes),
        preprocessing=Preprocessing.from_fields(fields["preprocessing"]),
        source=str(fields["source"]),
        metrics=dict(fields["metrics"]),
    )


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
