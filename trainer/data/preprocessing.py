"""The preprocessing that a model expects: that of its published weights, or the one that it was trained with.

Uses the standard library only, since a config is checked before torch is imported.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

_LOWEST = {"mean": 0.0, "std": 0.001}
_EXPECTED = {"mean": "three numbers from 0 to 1", "std": "three numbers from 0.001 to 1"}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """Resize, crop and normalization of an image; part of the metadata of a model file."""

    image_size: int
    """Height and width of the model's input [pixels]."""
    resize_size: int
    """Size of the resized image, before the central crop [pixels]."""
    resize: Literal["squash", "shorter"]
    """Whether both sides are resized to `resize_size`, or the shorter one."""
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel."""

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> "Preprocessing":
        """Return the preprocessing of a file's metadata.

        Raises:
            ValueError, TypeError, KeyError: a field is missing, has the wrong type, or is out of range.

        """
        for key in ("image_size", "resize_size"):
            if not (isinstance(fields[key], int) and 1 <= fields[key] <= 8192):
                raise ValueError(f"{key} is {fields[key]!r}, expected 1 to 8192 pixels")
        if fields["resize"] not in ("squash", "shorter"):
            raise ValueError(f"resize is {fields['resize']!r}, expected squash or shorter")
        rgb = {key: tuple(float(value) for value in fields[key]) for key in ("mean", "std")}
        if wrong := find_wrong_normalization(rgb["mean"], rgb["std"]):
            raise ValueError(wrong)
        if fields["interpolation"] not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {fields['interpolation']!r}, expected bilinear or bicubic")
        return cls(
            image_size=fields["image_size"],
            resize_size=fields["resize_size"],
            resize=fields["resize"],
            interpolation=fields["interpolation"],
            **rgb,  # type: ignore[arg-type]
        )


def find_wrong_normalization(mean: Sequence[float] | None, std: Sequence[float] | None) -> str | None:
    """Return what is wrong with a mean or a standard deviation of red, green and blue, or None. None is not checked."""
    for key, values in (("mean", mean), ("std", std)):
        if values is None:
            continue
        lowest = _LOWEST[key]
        if len(values) == 3 and all(lowest <= value <= 1 for value in values):
            continue
        text = ", ".join(f"{value:g}" for value in values)
        reason = f"{key} is [{text}]: expected {_EXPECTED[key]}, for pixel values from 0 to 1"
        is_8_bit = len(values) == 3 and all(lowest <= value <= 255 for value in values)
        if is_8_bit and max(values) > 2 and all(map(math.isfinite, values)):
            scaled = ", ".join(f"{value / 255:.3f}" for value in values)
            reason += f". For pixel values from 0 to 255, divide by 255: [{scaled}]"
        return reason
    return None
