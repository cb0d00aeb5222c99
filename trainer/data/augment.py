"""From a decoded picture to the model's input: the recipe's transforms, and torchvision v2's.

Every random choice comes from the example: torch's generator is seeded from (seed, epoch, example) while
a transform runs, so an example's crop is the same in whichever process, worker or attempt it is made.
Transforms work on PIL images, whose resize is the recipe's own (antialiased), and end in uint8; the
conversion to normalised floats is done in batches on the device (`normalise`).
"""

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import InterpolationMode, v2

Transform = Callable[[Image.Image], Image.Image]
Augmentation = Literal["recipe", "none", "trivialaugment", "randaugment", "augmix"]

_POLICIES: dict[str, Callable[[InterpolationMode], torch.nn.Module]] = {
    "trivialaugment": lambda mode: v2.TrivialAugmentWide(interpolation=mode),
    "randaugment": lambda mode: v2.RandAugment(interpolation=mode),
    "augmix": lambda mode: v2.AugMix(interpolation=mode),
}


@dataclass(frozen=True, kw_only=True)
class Preprocessing:
    """How a picture becomes the model's input; a model file carries it, so that one file is enough."""

    image_size: int
    """Side of the model's input [pixels]."""
    resize_size: int
    """Size before the central crop [pixels]."""
    resize: Literal["squash", "shorter"]
    """Both sides to `resize_size`, or the shorter one."""
    interpolation: Literal["nearest", "bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    @property
    def mode(self) -> InterpolationMode:
        """Return torchvision's name for the interpolation."""
        return InterpolationMode(self.interpolation)


def test_transform(preprocessing: Preprocessing) -> Transform:
    """Return resize and central crop: RGB picture of any size -> [image_size, image_size]."""
    size = preprocessing.resize_size
    target = [size, size] if preprocessing.resize == "squash" else [size]
    return v2.Compose(
        [
            v2.Resize(target, interpolation=preprocessing.mode, antialias=True),
            v2.CenterCrop(preprocessing.image_size),
        ]
    )


def train_transform(preprocessing: Preprocessing, augment: Augmentation, crop_scale: tuple[float, float]) -> Transform:
    """Return the random transform of training: RGB picture of any size -> [image_size, image_size]."""
    if augment == "none":
        return test_transform(preprocessing)
    steps: list[torch.nn.Module] = [
        v2.RandomResizedCrop(
            preprocessing.image_size, scale=crop_scale, interpolation=preprocessing.mode, antialias=True
        ),
        v2.RandomHorizontalFlip(),
    ]
    if augment != "recipe":
        steps.append(_POLICIES[augment](preprocessing.mode))
    return v2.Compose(steps)


def example_seed(seed: int, epoch: int, example: int) -> int:
    """Return the 64-bit seed of one example in one epoch: a hash, so that neighbours are unrelated."""
    digest = hashlib.blake2b(struct.pack("<QQQ", seed, epoch, example), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def apply_seeded(transform: Transform, image: Image.Image, seed: int) -> Image.Image:
    """Return `transform(image)` with its randomness taken from `seed`; torch's own state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return transform(image)


def to_array(image: Image.Image) -> np.ndarray:
    """Return an RGB picture as uint8 [height, width, 3]."""
    return np.asarray(image)


def normalise(images: Tensor, preprocessing: Preprocessing) -> Tensor:
    """Return uint8 images [B, 3, H, W] as float32, scaled to [0, 1], less the mean, over the deviation.

    One multiply and one add for each value; the memory layout of `images` is kept.
    """
    mean = torch.tensor(preprocessing.mean, device=images.device).view(1, 3, 1, 1)
    std = torch.tensor(preprocessing.std, device=images.device).view(1, 3, 1, 1)
    return torch.addcmul(-mean / std, images.float(), 1 / (255 * std))
