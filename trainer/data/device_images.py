"""Decoded images in the memory of a device, and their random crops in batches.

An antialiased resize is linear in the pixels of each row and of each column. The crops of a batch are therefore two
batched matrix products, rows first, with the filters of Pillow and torchvision. As there, pixels are rounded to 8 bits
after each of them, so that the results are within 2 gray levels of `random_crop.resized_crop`.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.random_crop import Box
from trainer.errors import UserError

_CHUNK_PIXELS = 2**23
"""Pixels that are resized at once: they need about 30 bytes each on the device."""
_NO_BOX = Box(0, 0, 0, 0)
_T = TypeVar("_T", int, np.ndarray, Tensor)


class CropParams(NamedTuple, Generic[_T]):
    """Random crop of an image; or, as arrays or tensors int64 [B], of a batch."""

    example: _T
    top: _T
    left: _T
    height: _T
    width: _T
    flipped: _T
    erased_top: _T
    erased_left: _T
    erased_height: _T
    erased_width: _T


def crop_params(example: int, box: Box, *, flipped: bool, erased: Box | None = None) -> CropParams[int]:
    """Return the parameters of an image; `erased` is a rectangle of the resized and flipped crop."""
    return CropParams(example, *box, int(flipped), *(erased or _NO_BOX))


@dataclass(frozen=True)
class DeviceImages:
    """Images of different sizes on one device."""

    pixels: Tensor
    """uint8 [P, 3]: the pixels of all images, row by row."""
    starts: np.ndarray
    """int64 [N]: position of the first pixel of each image."""
    sizes: np.ndarray
    """int64 [N, 2]: height and width of each image."""

    @classmethod
    def load(
        cls, read: Callable[[int], np.ndarray], count: int, device: torch.device, *, threads: int = 1
    ) -> "DeviceImages":
        """Copy images to a device. Each of them is read twice: for its size, then for its pixels.

        Args:
            read: returns one of the images 0 to `count` - 1, uint8 [H, W, 3].
            count: number of images.
            device: receives them.
            threads: number of images that are read at once.

        Raises:
            UserError: they do not fit into the free memory of the device.

        """
        with ThreadPoolExecutor(threads) as pool:
            shapes = list(pool.map(lambda example: read(example).shape[:2], range(count)))
            sizes = np.array(shapes, dtype=np.int64).reshape(count, 2)
            lengths = sizes.prod(axis=1)
            starts = lengths.cumsum() - lengths
            images = cls(allocate(int(lengths.sum()), 3, device=device), starts, sizes)
            list(pool.map(lambda example: images._write(example, read(example)), range(count)))
        return images

    def _write(self, example: int, image: np.ndarray) -> None:
        start = int(self.starts[example])
        pixels = torch.tensor(image).view(-1, 3)  # copies the image, which may be a read-only view
        self.pixels[start : start + len(pixels)] = pixels

    def crop(self, params: np.ndarray, size: int, interpolation: Literal["bilinear", "bicubic"]) -> Tensor:
        """Return the crops of a batch, resized with antialiasing and flipped: uint8 [B, size, size, 3].

        `params` is a `CropParams` for each image, int64 [B, 10].
        """
        device = self.pixels.device
        result = torch.empty(len(params), size, size, 3, dtype=torch.uint8, device=device)
        # Crops of similar sizes are resized together: the others are padded to the largest.
        order = np.argsort(params[:, 3] * params[:, 4], kind="stable")
        ordered: CropParams[np.ndarray] = CropParams(*params[order].T)
        columns = (order, self.starts[ordered.example], self.sizes[ordered.example, 1], *ordered)
        table = to_device(torch.from_numpy(np.stack(columns)), device)
        for part, height, width in _chunks(ordered.height, ordered.width):
            positions, starts, row_lengths = table[:3, part]
            crop: CropParams[Tensor] = CropParams(*table[3:, part])
            pixels = self._gather(crop, starts, row_lengths, height, width)
            by_row = resize_weights(crop.width, width, size, interpolation, crop.flipped)
            by_column = resize_weights(crop.height, height, size, interpolation)
            result[positions] = _resize(pixels, by_row, by_column)
        return result

    def _gather(self, crop: CropParams[Tensor], starts: Tensor, row_lengths: Tensor, height: int, width: int) -> Tensor:
        """Return the pixels of crops, uint8 [B, height, width, 3]; smaller crops repeat their last row and column."""
        rows = torch.arange(height, device=starts.device).minimum(crop.height[:, None] - 1) + crop.top[:, None]
        columns = torch.arange(width, device=starts.device).minimum(crop.width[:, None] - 1) + crop.left[:, None]
        row_starts = starts[:, None] + rows * row_lengths[:, None]
        return self.pixels[row_starts[:, :, None] + columns[:, None, :]]


def erase(images: Tensor, params: Tensor, color: Sequence[int]) -> Tensor:
    """Return images uint8 [B, S, S, 3] with their erased rectangles in a color (red, green, blue).

    `params` is a `CropParams` for each image, int64 [B, 10].
    """
    crop: CropParams[Tensor] = CropParams(*to_device(params, images.device).T)
    positions = torch.arange(images.shape[1], device=images.device)
    rows, columns = (
        (positions >= start[:, None]) & (positions < (start + length)[:, None])
        for start, length in ((crop.erased_top, crop.erased_height), (crop.erased_left, crop.erased_width))
    )
    erased = rows[:, :, None] & columns[:, None, :]
    return torch.where(erased[..., None], to_device(torch.tensor(color, dtype=torch.uint8), images.device), images)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor of the host; a copy from memory that is not pinned would wait for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def allocate(*shape: int, device: torch.device) -> Tensor:
    """Return uninitialized memory of a device, uint8 of the shape.

    Raises:
        UserError: it does not fit into the free memory.

    """
    needed = int(np.prod(shape, dtype=np.int64))
    if device.type == "cuda" and needed > (free := _free_memory(device)):
        raise UserError(
            f"data.cache_images is device: a split needs {needed / 1e9:,.1f} GB, but {device} has {free / 1e9:,.1f} GB "
            "of free memory, which the model needs too: set it to auto or ram"
        )
    return torch.empty(shape, dtype=torch.uint8, device=device)


def _free_memory(device: torch.device) -> int:
    """Return the free memory of a GPU, including what PyTorch has reserved and does not use [bytes]."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def resize_weights(
    lengths: Tensor,
    longest: int,
    size: int,
    interpolation: Literal["bilinear", "bicubic"],
    flipped: Tensor | None = None,
) -> Tensor:
    """Return the matrices that resize rows of pixels to `size` with antialiasing, as Pillow does.

    Args:
        lengths: number of pixels of each row, int64 [B].
        longest: number of pixels that rows are padded to, L; padding has the weight 0.
        size: number of pixels of the result, S.
        interpolation: bilinear is a triangle filter, bicubic that of Keys 1981 with a = -0.5.
        flipped: rows to reverse, int64 [B]; None reverses none.

    Returns:
        float32 [B, S, L].

    """
    scale = lengths[:, None, None] / size
    centers = torch.arange(size, device=lengths.device)[:, None] + 0.5
    if flipped is not None:
        centers = torch.where(flipped[:, None, None] > 0, size - centers, centers)
    pixels = torch.arange(longest, device=lengths.device)
    distance = ((pixels + 0.5 - centers * scale) / scale.clamp(min=1)).abs()
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = weights * (pixels < lengths[:, None, None])
    return weights / weights.sum(dim=2, keepdim=True)


def _resize(pixels: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Return images uint8 [B, H, W, 3] resized to uint8 [B, S, S, 3] by matrices [B, S, W] and [B, S, H]."""
    # Products of fp16 are summed in fp32: the error is a tenth of a gray level. CPUs have no fast fp16.
    dtype = torch.float16 if pixels.is_cuda else torch.float32
    batch, height, _, channels = pixels.shape
    planes = pixels.permute(0, 3, 1, 2).to(dtype, memory_format=torch.contiguous_format)
    rows = torch.bmm(planes.flatten(1, 2), by_row.to(dtype).mT).round_().clamp_(0, 255)
    resized = by_column.to(dtype)[:, None] @ rows.view(batch, channels, height, -1)
    return resized.round_().clamp_(0, 255).to(torch.uint8).permute(0, 2, 3, 1)


def _chunks(heights: np.ndarray, widths: np.ndarray) -> Iterator[tuple[slice, int, int]]:
    """Yield slices of a batch with the largest height and width in them; padded to these, a slice is not too large."""
    start = 0
    while start < len(heights):
        tallest, widest = (np.maximum.accumulate(lengths[start:]) for lengths in (heights, widths))
        padded = tallest * widest * np.arange(1, len(tallest) + 1)
        count = max(1, int(np.searchsorted(padded, _CHUNK_PIXELS, side="right")))
        yield slice(start, start + count), int(tallest[count - 1]), int(widest[count - 1])
        start += count
