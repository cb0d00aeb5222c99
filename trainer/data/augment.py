"""Transforms from a decoded image to the model's input.

The randomness of a transform belongs to the example: its generator is seeded from (seed, epoch, example), so the crop
is the same in every process, worker and thread. Every resize is antialiased, as in the D2L recipe. Batches are
converted to floats and normalized on the device (`Normalize`).
"""

import threading
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

from trainer.data.preprocessing import Preprocessing
from trainer.data.random_crop import Box, flip, resized_crop, sample_crop, sample_erasing

Augmentation = Literal["basic", "none", "trivialaugment", "randaugment", "augmix"]

_POLICIES = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment, "augmix": v2.AugMix}
_ELONGATED = 1000
"""Ratio of the sides of an image to which its ends are removed, if the shorter side is resized."""
_global_generator = threading.Lock()
"""Held by the thread whose policy draws from PyTorch's global generator."""


class Transform(Protocol):
    """Maps a decoded image to an image of the model's size."""

    def __call__(self, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return uint8 [S, S, 3] of an RGB image, uint8 [H, W, 3], which may be a read-only view."""


class EvalTransform:
    """Resize and central crop to [image_size, image_size], by Pillow."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        size = preprocessing.resize_size
        self._squash = preprocessing.resize == "squash"
        target = [size, size] if self._squash else [size]
        self._transform = v2.Compose(
            [
                v2.Resize(target, interpolation=InterpolationMode(preprocessing.interpolation), antialias=True),
                v2.CenterCrop(preprocessing.image_size),
            ]
        )

    def __call__(self, image: np.ndarray, generator: torch.Generator | None = None) -> np.ndarray:
        """Return uint8 [image_size, image_size, 3]; nothing is drawn from the generator."""
        return np.asarray(self._transform(Image.fromarray(image if self._squash else _without_ends(image))))


def _without_ends(image: np.ndarray) -> np.ndarray:
    """Return the center of an image whose sides differ by a factor above 1000, and other images as they are.

    A file of a few hundred bytes may hold 65535 x 1 pixels: resized to 256 pixels of height, they would take 17 GB. An
    even multiple of the shorter side is removed at both ends, so the central crop is the same up to rounding.
    """
    height, width = image.shape[:2]
    shorter = min(height, width)
    top, left = (max(0, side // shorter - _ELONGATED) // 4 * 2 * shorter for side in (height, width))
    return image[top : height - top, left : width - left]


@dataclass(frozen=True)
class ResizeShorter:
    """Reduce the shorter side of an image by Pillow, with a Lanczos filter; smaller images are unchanged."""

    size: int
    """Length of the shorter side [pixels]."""

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Return uint8 [H, W, 3]; the aspect ratio is kept."""
        height, width, _ = image.shape
        shorter = min(height, width)
        if shorter <= self.size:
            return image
        resized = (round(width * self.size / shorter), round(height * self.size / shorter))
        return np.asarray(Image.fromarray(image).resize(resized, Image.Resampling.LANCZOS))


class TrainTransform:
    """Random crop and flip to [image_size, image_size], then a policy and random erasing."""

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
        self.preprocessing, self.augment, self.random_erasing = preprocessing, augment, random_erasing
        self.mean = [min(255, max(0, round(255 * value))) for value in preprocessing.mean]
        """Red, green and blue of erased pixels, in 0 to 255."""
        self._crop_scale = crop_scale
        self._resize = EvalTransform(preprocessing) if augment == "none" else None
        self._interpolation = InterpolationMode(preprocessing.interpolation)
        self._policy = _POLICIES[augment](interpolation=self._interpolation) if augment in _POLICIES else None

    def sample(self, height: int, width: int, generator: torch.Generator) -> tuple[Box, bool, Box | None]:
        """Return what is drawn for an image if `augment` is "basic": crop, whether to flip, and erased rectangle."""
        return *sample_crop(height, width, self._crop_scale, generator), self._sample_erasing(generator)

    def _sample_erasing(self, generator: torch.Generator) -> Box | None:
        size = self.preprocessing.image_size
        return sample_erasing(size, size, self.random_erasing, generator) if self.random_erasing else None

    def __call__(self, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
        """Return uint8 [image_size, image_size, 3]."""
        if self._resize is not None:
            image = self._resize(image)
        else:
            height, width, _ = image.shape
            box, flipped = sample_crop(height, width, self._crop_scale, generator)
            image = resized_crop(image, box, self.preprocessing.image_size, self._interpolation)
            image = flip(image) if flipped else image
        if self._policy is not None:
            image = _apply_policy(self._policy, image, generator)
        erased = self._sample_erasing(generator)
        if erased is not None:
            image = image.copy()  # the result of Pillow is read-only
            image[erased.slices] = self.mean
        return image


def _apply_policy(policy: torch.nn.Module, image: np.ndarray, generator: torch.Generator) -> np.ndarray:
    """Apply a policy of torchvision, by Pillow. It draws from PyTorch's global generator, which is restored."""
    with _global_generator, torch.random.fork_rng(devices=[]):
        torch.default_generator.set_state(generator.get_state())
        image = np.asarray(policy(Image.fromarray(image)))
        generator.set_state(torch.default_generator.get_state())
    return image


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
