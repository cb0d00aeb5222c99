"""`Preset`: the preprocessing that a model's published weights expect."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Preset:
    """Preprocessing of a model's published weights."""

    image_size: int
    """Side of the model's square input in pixels."""
    resize_size: int
    """Size in pixels to which an image is resized before the center crop."""
    resize: Literal["squash", "shorter"]
    """Whether both sides are resized to `resize_size`, or the shorter one."""
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    """Mean of each channel, for values in [0, 1]."""
    std: tuple[float, float, float]
    """Standard deviation of each channel."""
