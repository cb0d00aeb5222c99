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
from safetensors.torch import save_file
from torch import Tensor, nn

from trainer.data.augment import Normalise, Preprocessing, test_transform, to_array
from trainer.data.decode import UnreadableImage, decode
from trainer.errors import UserError
from trainer.files import write_atomically
from trainer.model.build import build, names
from trainer.model.head import find_heads, graft

FORMAT = 1
HEADER_KEY = "regraft"


@dataclass(frozen=True, kw_only=True)
class Description:
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
        self._transform = test_transform(preprocessing)
        self._normalise = Normalise(preprocessing, torch.device("cpu"))

    def __call__(self, picture: Image.Image | str | os.PathLike[str]) -> Tensor:
        """Return float32 [3, image_size, image_size].

        Raises:
            UserError: a path that is not a readable image.

        """
        if isinstance(picture, str | os.PathLike):
            try:
                picture = decode(picture)
            except UnreadableImage as error:
                raise UserError(f"{os.fspath(picture)}: {error}; expected an image file") from None
        array = torch.tensor(to_array(self._transform(picture.convert("RGB"))))
        return self._normalise(array.permute(2, 0, 1)[None])[0]


class Loaded(NamedTuple):
    """A model file, ready to predict with."""

    model: nn.Module
    preprocess: Preprocess
    classes: tuple[str, ...]


def write_model(path: Path, state: Mapping[str, Tensor], description: Description) -> None:
    """Write weights and description into one file, which is whole or absent."""
    fields = {"format": FORMAT, **dataclasses.asdict(description)}
    header = {HEADER_KEY: json.dumps(fields, ensure_ascii=False), "format": "pt"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata=header))


def read_description(path: str | os.PathLike[str]) -> Description | None:
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
        return _description(json.loads(text))
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{os.fspath(path)}: its description is damaged ({error!r}): write the file again") from None


def _description(fields: Any) -> Description:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
    classes = fields["classes"]
    if not (isinstance(classes, list) and len(classes) >= 2 and all(isinstance(c, str) for c in classes)):
        raise ValueError("classes are not a list of two names or more")
    if fields["architecture"] not in names():
        raise ValueError(f"architecture {fields['architecture']!r} is not one of torchvision's")
    return Description(
        version=str(fields["version"]),
        architecture=fields["architecture"],
        classes=tuple(classes),
        preprocessing=Preprocessing.from_fields(fields["preprocessing"]),
        source=str(fields["source"]),
        metrics=dict(fields["metrics"]),
    )


def load(path: str | os.PathLike[str]) -> Loaded:
    """Return the model (eval mode, CPU), its preprocessing and its classes; see `trainer.load`."""
    if not Path(path).is_file():
        raise UserError(f"{os.fspath(path)}: there is no such file; expected a run's model.safetensors")
    found = read_description(path)
    if found is None:
        raise UserError(f"{os.fspath(path)}: holds weights but not regraft's description; expected a run's model.safetensors")
    size = found.preprocessing.image_size
    with torch.random.fork_rng(devices=[]):  # the weights drawn here are overwritten
        model = build(found.architecture, image_size=size)
        graft(model, find_heads(model, size), len(found.classes), "torch")
    with safe_open(path, framework="pt") as file:
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(f"{os.fspath(path)}: its weights do not fit its description: {error}") from None
    return Loaded(model.eval(), Preprocess(found.preprocessing), found.classes)
