"""Write and read the header of a model file: architecture, classes, preprocessing, source, metrics and calibration.

The header's entry `regraft` is JSON. A file may come from anywhere: nothing in it is executed, and every field is
validated. Files of earlier versions lack the optional fields.
"""

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from trainer.data.preprocessing import Preprocessing
from trainer.distributed.precision import PRECISIONS, Execution
from trainer.errors import UserError
from trainer.model.architectures import architectures, is_timm
from trainer.model.torchvision_weights import file_path, is_file
from trainer.model.weights_file import find_weights_file, is_safetensors
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

FORMAT = 1
HEADER_KEY = "regraft"
UnknownScore = Literal["max_logit", "energy"]
UNKNOWN_SCORES: tuple[UnknownScore, ...] = get_args(UnknownScore)


@dataclass(frozen=True, kw_only=True)
class UnknownThreshold:
    """Reject option: an image whose score is below the threshold shows none of the classes."""

    score: UnknownScore
    """Score of the logits: the largest one (max_logit), or their logsumexp, which is the negative energy (energy)."""
    threshold: float


def compute_score(logits: Tensor, score: UnknownScore) -> Tensor:
    """Return the score of each example, float32 [N]: high for images of the classes. `logits` are float32 [N, K]."""
    return logits.amax(1) if score == "max_logit" else logits.logsumexp(1)


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
    execution: Execution | None = None
    """Precision and memory layout of the run's evaluation; None in a file of an earlier version."""
    temperature: float | None = None
    """Calibration: probabilities are the softmax of the logits divided by it; None: not calibrated."""
    unknown: UnknownThreshold | None = None
    """Reject option; None: every image is one of the classes."""

    def to_fields(self) -> dict[str, Any]:
        """Return the header's JSON object. Optional fields that are None are left out."""
        fields = dataclasses.asdict(self) | {"execution": self.execution and self.execution._asdict()}
        optional = ("execution", "temperature", "unknown")
        return {"format": FORMAT} | {
            key: value for key, value in fields.items() if value is not None or key not in optional
        }


def write_model(path: Path, state: Mapping[str, Tensor], metadata: ModelMetadata) -> None:
    """Write weights and header into one file, which is complete or absent."""
    # json.dumps escapes to ASCII: a class may be named after a folder whose name is not valid Unicode.
    header = {HEADER_KEY: json.dumps(metadata.to_fields()), "format": "pt"}
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


def update_metadata(path: Path, **changes: Any) -> ModelMetadata:
    """Rewrite a model file with changed fields in its header, atomically; return the new header.

    Args:
        path: the file. Its weights stay as they are, bit for bit.
        changes: field of `ModelMetadata` -> value.

    Raises:
        UserError: regraft did not write the file, or it cannot be read or written.

    """
    metadata = read_metadata(path)
    if metadata is None:
        raise UserError(f"{path}: holds weights but no regraft header; expected a run's model.safetensors")
    metadata = dataclasses.replace(metadata, **changes)
    try:
        write_model(path, load_file(path), metadata)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{path}: its header cannot be rewritten ({reason}); the file is unchanged") from None
    return metadata


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
    "".join(classes).encode("utf-8", "surrogateescape")  # a UnicodeEncodeError is a ValueError
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
        execution=_parse_execution(fields.get("execution")),
        temperature=_parse_temperature(fields.get("temperature")),
        unknown=_parse_unknown(fields.get("unknown")),
    )


def _parse_execution(fields: Any) -> Execution | None:
    if fields is None:
        return None
    if fields["precision"] not in PRECISIONS or not isinstance(fields["channels_last"], bool):
        raise ValueError(f"execution is {fields!r}, expected a precision ({', '.join(PRECISIONS)}) and channels_last")
    return Execution(fields["precision"], fields["channels_last"])


def _parse_temperature(value: Any) -> float | None:
    if value is not None and not (_is_number(value) and 1e-3 <= value <= 1e3):
        raise ValueError(f"temperature is {value!r}, expected a number from 0.001 to 1000")
    return value if value is None else float(value)


def _parse_unknown(fields: Any) -> UnknownThreshold | None:
    if fields is None:
        return None
    if fields["score"] not in UNKNOWN_SCORES or not _is_number(fields["threshold"]):
        raise ValueError(f"unknown is {fields!r}, expected a score ({', '.join(UNKNOWN_SCORES)}) and a threshold")
    return UnknownThreshold(score=fields["score"], threshold=float(fields["threshold"]))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
