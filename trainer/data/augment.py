"""Transforms from a decoded image to the model's input.

The randomness of a transform belongs to the example: its generator is seeded from (seed, epoch, example), so the crop
is the same in every process, worker and thread. Every resize is antialiased, as in the D2L recipe. Batches are
converted to floats and normalized on the device (`Normalize`).
"""

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from trainer.data.normalization import find_wrong_normalization

Augmentation = Literal["basic", "none", "trivialaugment", "randaugment", "augmix"]

_POLICIES = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment, "augmix": v2.AugMix}
_global_generator = threading.Lock()


class Transform(Protocol):
    """Maps a decoded image to an image of the model's size."""

    def __call__(self, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return uint8 [S, S, 3] of an RGB image, uint8 [H, W, 3], which may be a read-only view."""


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
    std: tuple[float, float, float]

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

    @property
    def mode(self) -> InterpolationMode:
        """Return the interpolation as torchvision's enum."""
        return InterpolationMode(self.interpolation)


class EvalTransform:
    """Resize and central crop to [image_size, image_size], by Pillow."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        size = preprocessing.resize_size
        target = [size, size] if preprocessing.resize == "squash" else [size]
        self._transform = v2.Compose(
            [
                v2.Resize(target, interpolation=preprocessing.mode, antialias=True),
                v2.CenterCrop(preprocessing.image_size),
            ]
        )

    def __call__(self, image: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Return uint8 [image_size, image_size, 3]; nothing is drawn from the generator."""
        return np.asarray(self._transform(Image.fromarray(image)))


class TrainTransform:
    """Random crop and flip to [image_size, image_size], then a policy and random erasing.

    torchvision draws from PyTorch's global generator. It is seeded while the transform runs, and restored.
    """

    def __init__(
        self,
        preprocessing: Preprocessing,
        augment: Augmentation,
        crop_scale: tuple[float, float],
        *,
        random_erasing: float = 0.0,
    ) -> None:
        """Create the transform.

        Args:
            preprocessing: size, interpolation, and the mean that erased pixels are set to.
            augment: steps of the transform; "none" resizes and crops as evaluation does.
            crop_scale: smallest and largest area of the crop, as fractions of the image.
            random_erasing: probability that a rectangle is set to the mean, which normalization maps to 0.

        """
        self._resize = EvalTransform(preprocessing) if augment == "none" else None
        mode = preprocessing.mode
        steps: list[torch.nn.Module] = []
        if self._resize is None:
            size = preprocessing.image_size
            steps = [
                v2.RandomResizedCrop(size, scale=crop_scale, interpolation=mode, antialias=True),
                v2.RandomHorizontalFlip(),
            ]
        if augment in _POLICIES:
            steps.append(_POLICIES[augment](interpolation=mode))
        if random_erasing:
            mean = [min(255.0, max(0.0, round(255 * value))) for value in preprocessing.mean]
            # The defaults are those of Zhong et al. 2020, except for the largest area: 1/3 of the image, not 0.4.
            steps.append(v2.RandomErasing(random_erasing, value=mean))  # type: ignore[arg-type]
        self._random = v2.Compose(steps) if steps else None

    def __call__(self, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return uint8 [image_size, image_size, 3]."""
        if self._resize is not None:
            image = self._resize(image)
        if self._random is None:
            return image
        with _global_generator, torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(generator.get_state())
            return np.asarray(self._random(Image.fromarray(image)))


class Normalize:
    """Normalize images [B, 3, H, W], uint8 or float in [0, 255], to float32: (image / 255 - mean) / std.

    The constants are copied to the device once. The memory format of the images is preserved.
    """

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        mean = torch.tensor(preprocessing.mean, dtype=torch.float64).view(1, 3, 1, 1)
        std = torch.tensor(preprocessing.std, dtype=torch.float64).view(1, 3, 1, 1)
        self._scale = (1 / (255 * std)).float().to(device)
        self._shift = (-mean / std).float().to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Return the model's input."""
        return torch.addcmul(self._shift, images.float(), self._scale)
