"""Random crop, flip and erasing of one image: their parameters, and their execution on a CPU.

The parameters are those that the v2 transforms of torchvision draw from a generator of the same seed, so that images
may also be cropped in batches on a device. torchvision draws from the global generator, which threads would share.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2.functional import resize_image

_CROP_RATIO, _ERASING_RATIO = (
    tuple(torch.tensor(ratio).log().tolist()) for ratio in ((3 / 4, 4 / 3), (0.3, 3.3))
)  # of torchvision's RandomResizedCrop and RandomErasing: the logarithms of the smallest and the largest aspect ratio
_ERASING_SCALE = (0.02, 0.33)
_ATTEMPTS = 10
_OPENMP_GRAIN = 32768
"""Number of elements from which PyTorch divides a simple operation among OpenMP threads (at::internal::GRAIN_SIZE)."""


class Box(NamedTuple):
    """Rectangle of an image [pixels]."""

    top: int
    left: int
    height: int
    width: int

    @property
    def slices(self) -> tuple[slice, slice]:
        """Return the rows and columns of the rectangle."""
        return slice(self.top, self.top + self.height), slice(self.left, self.left + self.width)


def sample_crop(height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> tuple[Box, bool]:
    """Return what v2.RandomResizedCrop and v2.RandomHorizontalFlip draw for an image: the crop, and whether to flip it.

    `scale` is the smallest and the largest area of the crop, as fractions of the image.
    """
    box = _sample_box(height, width, scale, generator)
    return box, torch.rand(1, generator=generator).item() < 0.5


def _sample_box(height: int, width: int, scale: tuple[float, float], generator: torch.Generator) -> Box:
    for _ in range(_ATTEMPTS):
        area, ratio = _sample_area_and_ratio(height * width, scale, _CROP_RATIO, generator)
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            return _place(h, w, height, width, generator)
    # A very long or high image, or one of a few pixels: the largest central crop of a permitted ratio.
    h = min(height, round(width / (3 / 4)))
    w = min(width, round(height * (4 / 3)))
    return Box((height - h) // 2, (width - w) // 2, h, w)


def sample_erasing(height: int, width: int, probability: float, generator: torch.Generator) -> Box | None:
    """Return the rectangle that v2.RandomErasing draws; None if it erases nothing."""
    if torch.rand(1, generator=generator).item() >= probability:
        return None
    for _ in range(_ATTEMPTS):
        area, ratio = _sample_area_and_ratio(height * width, _ERASING_SCALE, _ERASING_RATIO, generator)
        h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if h < height and w < width:
            return _place(h, w, height, width, generator)
    return None


def _sample_area_and_ratio(
    pixels: int, scale: tuple[float, float], log_ratio: tuple[float, ...], generator: torch.Generator
) -> tuple[float, float]:
    area = pixels * torch.empty(1).uniform_(*scale, generator=generator).item()
    ratio = torch.exp(torch.empty(1).uniform_(*log_ratio, generator=generator)).item()
    return area, ratio


def _place(height: int, width: int, image_height: int, image_width: int, generator: torch.Generator) -> Box:
    top = int(torch.randint(image_height - height + 1, (1,), generator=generator).item())
    left = int(torch.randint(image_width - width + 1, (1,), generator=generator).item())
    return Box(top, left, height, width)


def resized_crop(image: np.ndarray, box: Box, size: int, interpolation: InterpolationMode) -> np.ndarray:
    """Return the crop of an image uint8 [H, W, 3], resized to uint8 [size, size, 3] with antialiasing.

    torchvision's resize of tensors takes a third of the time of Pillow's, and differs from it by at most 2 gray levels.
    Pillow 13 resizes the columns of some crops before the rows: where bicubic overshoot is clipped, the difference is
    larger. The resize reads [3, height, width] in the memory format channels_last: the strides of a decoded image.
    """
    crop = torch.from_numpy(image[box.slices].copy())  # a copy is writable, and the resize would make one anyway
    resized = resize_image(crop.permute(2, 0, 1), [size, size], interpolation=interpolation, antialias=True)
    return np.ascontiguousarray(resized.permute(1, 2, 0).numpy())


def flip(image: np.ndarray) -> np.ndarray:
    """Return an image uint8 [H, W, 3] mirrored from left to right.

    NumPy takes ten times as long as PyTorch. PyTorch gets the image in parts that it does not divide among OpenMP
    threads: several images are transformed at once already, and OpenMP threads wait for each other.
    """
    flipped = np.empty_like(image)
    rows = max(1, (_OPENMP_GRAIN - 1) // image[0].size)
    for start in range(0, len(image), rows):
        part = torch.from_numpy(image[start : start + rows])
        flipped[start : start + rows] = part.permute(2, 0, 1).flip(-1).permute(1, 2, 0).numpy()
    return flipped
