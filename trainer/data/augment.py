"""Transforms from a decoded image to the model's input.

The randomness of a transform belongs to the example: PyTorch's generator is seeded from (seed, epoch, example) while
it runs, so the crop is the same in every process and worker. Transforms take and return PIL images, whose resize is
antialiased, as in the D2L recipe. Batches are converted to floats and normalized on the device (`Normalize`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from trainer.data.normalization import find_wrong_normalization

Transform = Callable[[Image.Image], Image.Image]
Augmentation = Literal["basic", "none", "trivialaugment", "randaugment", "augmix"]

_POLICIES: dict[str, Callable[[InterpolationMode], torch.nn.Module]] = {
    "trivialaugment": lambda mode: v2.TrivialAugmentWide(interpolation=mode),
    "randaugment": lambda mode: v2.RandAugment(interpolation=mode),
    "augmix": lambda mode: v2.AugMix(interpolation=mode),
}


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


def eval_transform(preprocessing: Preprocessing) -> Transform:
    """Return the transform for evaluation: resize and central crop to [image_size, image_size]."""
    size = preprocessing.resize_size
    target = [size, size] if preprocessing.resize == "squash" else [size]
    return v2.Compose(
        [v2.Resize(target, interpolation=preprocessing.mode, antialias=True), v2.CenterCrop(preprocessing.image_size)]
    )


def train_transform(
    preprocessing: Preprocessing, augment: Augmentation, crop_scale: tuple[float, float], *, random_erasing: float = 0.0
) -> Transform:
    """Return the random transform for training, to [image_size, image_size].

    `random_erasing` is the probability that a rectangle is set to the mean, which normalization maps to 0.
    """
    transform = _augment(preprocessing, augment, crop_scale)
    if not random_erasing:
        return transform
    mean = [min(255, max(0, round(255 * value))) for value in preprocessing.mean]
    # torchvision's defaults are those of Zhong et al. 2020, except for the largest area: 1/3 of the image, not 0.4.
    return v2.Compose([transform, v2.RandomErasing(random_erasing, value=mean)])  # type: ignore[arg-type]


def _augment(preprocessing: Preprocessing, augment: Augmentation, crop_scale: tuple[float, float]) -> Transform:
    if augment == "none":
        return eval_transform(preprocessing)
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(
            preprocessing.image_size, scale=crop_scale, interpolation=preprocessing.mode, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ]
    if augment != "basic":
        steps.append(_POLICIES[augment](preprocessing.mode))
    return v2.Compose(steps)


def apply_seeded(transform: Transform, image: Image.Image, seed: int) -> Image.Image:
    """Return `transform(image)` with randomness from `seed`; the state of PyTorch's generator is preserved."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB image as uint8 [height, width, 3]."""
    return np.asarray(image)


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
