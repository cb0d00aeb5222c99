"""Read architecture, source and parameter counts from the header of a model file, without torch."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

_MAX_HEADER = 1 << 26
_KEY = "regraft"


@dataclass(frozen=True, kw_only=True)
class ModelHeader:
    """What the header of a model file says."""

    architecture: str
    source: str
    """Where the weights came from before fine-tuning."""
    version: str
    """Version of regraft that wrote the file."""
    parameters: int
    """Number of values of all tensors, with the BatchNorm statistics."""
    size: int
    """Size of the file [bytes]."""


def read_model_header(path: Path) -> ModelHeader | None:
    """Return the header of a safetensors file; None if regraft did not write it.

    The file begins with the length of its header, 8 bytes, little-endian, and the header as JSON.

    Raises:
        OSError, ValueError, TypeError, LookupError: it is damaged.

    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise ValueError("its header is too large")
        header = json.loads(file.read(length))
    metadata = header.pop("__metadata__", {})
    if _KEY not in metadata:
        return None
    fields = json.loads(metadata[_KEY])
    return ModelHeader(
        architecture=str(fields["architecture"]),
        source=str(fields["source"]),
        version=str(fields["version"]),
        parameters=sum(math.prod(tensor["shape"]) for tensor in header.values()),
        size=path.stat().st_size,
    )
