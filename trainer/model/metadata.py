"""Write and read the header of a model file: architecture, classes, preprocessing, source and metrics.

The header's entry `regraft` is JSON. A file may come from anywhere: nothing in it is executed, and every field is
validated.
"""

import dataclasses
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.data.augment import Preprocessing
from trainer.errors import UserError
from trainer.model.architectures import architectures, is_timm
from trainer.model.torchvision_weights import file_path, is_file
from trainer.model.weights_file import find_weights_file, is_safetensors
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

FORMAT = 1
HEADER_KEY = "regraft"


@dataclass(frozen=True, kw_only=True)
class ModelMetadata:
    """Header of a model file."""

    version: str
    """Version of regraft that wrote the file."""
    architecture: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    source: str
    """Where the weights came from before fine-tuning."""
    metrics: Mapping[str, Any]
    """Metrics of the saved epoch."""


def write_model(path: Path, state: Mapping[str, Tensor], metadata: ModelMetadata) -> None:
    """Write weights and header into one file, which is complete or absent."""
    fields = {"format": FORMAT, **dataclasses.asdict(metadata)}
    # json.dumps escapes to ASCII: a class may be named after a folder whose name is not valid Unicode.
    header = {HEADER_KEY: json.dumps(fields), "format": "pt"}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    # safetensors' save_file would leave a file with a random name if it is killed.
    write_atomically(path, lambda temporary: temporary.write_bytes(save(tensors, metadata=header)))


def read_metadata(path: str | os.PathLike[str]) -> ModelMetadata | None:
    """Return the header of a model file, or None for a safetensors file that regraft did not write.

    Raises:
        UserError: the file is not readable, or its header is damaged or has a later format.

    """
    if not is_safetensors(Path(path)):  # which tells a missing permission, too
        raise UserError(f"{os.fspath(path)}: not a readable safetensors file; expected a run's model.safetensors")
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
            f"{os.fspath(path)}: its header is damaged ({escape_unprintable(reason)[:200]}); expected a run's "
            "model.safetensors as it was written"
        ) from None


def read_weights_metadata(weights: str) -> ModelMetadata | None:
    """Return the header of the weights that `model.weights` names, or None unless regraft wrote them.

    Weights that are missing or cannot be read have no header here: `read_weights` reports them.

    Raises:
        UserError: the header is damaged or has a later format.

    """
    if not is_file(weights):
        return None
    try:
        file = find_weights_file(file_path(weights))
        if not is_safetensors(file):
            return None
    except UserError:
        return None
    return read_metadata(file)


def _parse_metadata(fields: Any) -> ModelMetadata:
    if fields["format"] != FORMAT:
        raise ValueError(f"format {fields['format']!r}, this version of regraft reads {FORMAT}")
    classes = fields["classes"]
    if not (isinstance(classes, list) and all(isinstance(c, str) for c in classes)):
        raise ValueError("classes are not a list of names")
    if len(classes) < 2 or len(set(classes)) < len(classes):
        raise ValueError(f"{len(classes)} classes, {len(set(classes))} different ones; expected two or more")
    architecture = fields["architecture"]
    # Whether timm has a model of this name is checked when the model is built, since timm may not be installed.
    if not isinstance(architecture, str) or not (is_timm(architecture) or architecture in architectures()):
        raise ValueError(f"architecture {architecture!r} is not one of torchvision's or timm's")
    return ModelMetadata(
        version=str(fields["version"]),
        architecture=architecture,
        classes=tuple(classes),
        preprocessing=Preprocessing.from_fields(fields["preprocessing"]),
        source=str(fields["source"]),
        metrics=dict(fields["metrics"]),
    )
