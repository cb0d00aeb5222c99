"""What an exported model says about itself: classes, preprocessing, and the other fields of the model file's header."""

import json
from typing import Any

from trainer.model.metadata import ModelMetadata


def describe(metadata: ModelMetadata, **fields: Any) -> dict[str, Any]:
    """Return the fields of the header, and others, as JSON has them; NaN and infinite values become None."""
    text = json.dumps(metadata.to_fields() | fields)
    description: dict[str, Any] = json.loads(text, parse_constant=lambda constant: None)
    return description


def as_texts(description: dict[str, Any]) -> dict[str, str]:
    """Return the same as name -> text; everything but texts is JSON, whose ASCII can hold any class name."""
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in description.items()}
