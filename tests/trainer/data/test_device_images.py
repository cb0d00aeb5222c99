from collections.abc import Sequence
from typing import Literal

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode

from tests.folders import noise_image
from trainer.data import device_images
from trainer.data.device_images import CropParams, DeviceImages, allocate, crop_params, erase
from trainer.data.random_crop import Box, flip, resized_crop, sample_crop, sample_erasing
from trainer.errors import UserError

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SIZES = ((90, 120), (40, 30), (1, 1), (1, 200), (300, 3))
IMAGES = [np.asarray(noise_image(number, size=size[::-1])) for number, size in enumerate(SIZES)]
COLOR = (124, 116, 104)


def random_params() -> list[CropParams[int]]:
    """Return crops of every image: random ones, the whole image, and the pixels in its corners."""
    params = []
    for example, (height, width) in enumerate(SIZES):
        for seed in range(6):
            generator = torch.Generator().manual_seed(seed)
            box, flipped = sample_crop(height, width, (0.08, 1.0), generator)
            erased = sample_erasing(24, 24, 0.5, generator)
            params.append(crop_params(example, box, flipped=flipped, erased=erased))
        corners = (Box(0, 0, 1, 1), Box(height - 1, width - 1, 1, 1), Box(height - 1, 0, 1, width))
        params += [crop_params(example, box, flipped=True) for box in (Box(0, 0, height, width), *corners)]
    return params


def cropped_on_cpu(params: CropParams[int], size: int, mode: InterpolationMode) -> np.ndarray:
    image = resized_crop(IMAGES[params.example], Box(*params[1:5]), size, mode)
    image = flip(image) if params.flipped else image
    image[Box(*params[6:]).slices] = COLOR
    return image


def crop(images: DeviceImages, params: Sequence[CropParams[int]], mode: Literal["bilinear", "bicubic"]) -> np.ndarray:
    cropped = images.crop(np.array(params), 24, mode)
    return erase(cropped, torch.tensor(params), COLOR).cpu().numpy()


@pytest.mark.parametrize("threads", [1, 3])
def test_loaded_images_keep_their_pixels(threads: int) -> None:
    images = DeviceImages.load(IMAGES.__getitem__, len(IMAGES), DEVICE, threads=threads)
    for image, start, size in zip(IMAGES, images.starts, images.sizes, strict=True):
        pixels = images.pixels[start : start + size.prod()].view(*size, 3)
        assert np.array_equal(pixels.cpu(), image)
    assert len(images.pixels) == sum(height * width for height, width in SIZES)


@pytest.mark.parametrize("chunk_pixels", [1, 20_000, 2**23])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_crops_in_batches_are_within_2_gray_levels_of_those_of_one_image(
    mode: Literal["bilinear", "bicubic"], chunk_pixels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_images, "_CHUNK_PIXELS", chunk_pixels)
    images, params = DeviceImages.load(IMAGES.__getitem__, len(IMAGES), DEVICE), random_params()
    result = crop(images, params, mode)
    assert result.shape == (len(params), 24, 24, 3)
    assert result.dtype == np.uint8
    expected = np.stack([cropped_on_cpu(one, 24, InterpolationMode(mode)) for one in params])
    difference = np.abs(result - expected.astype(np.int16))
    assert difference.max() <= 2
    assert difference.mean() < 0.15, "gray levels"
    erased = [one for one in params if one.erased_height]
    assert len(erased) > 5
    for one, image in zip(params, result, strict=True):
        assert (image[Box(*one[6:]).slices] == COLOR).all()


def test_crop_does_not_depend_on_its_batch() -> None:
    images, params = DeviceImages.load(IMAGES.__getitem__, len(IMAGES), DEVICE), random_params()
    together = crop(images, params, "bilinear")
    for one, image in zip(params, together, strict=True):
        assert np.abs(crop(images, [one], "bilinear")[0] - image.astype(np.int16)).max() <= 1, "rounding"
    assert images.crop(np.empty((0, 10), np.int64), 24, "bilinear").shape == (0, 24, 24, 3)


def test_images_that_exceed_the_free_memory_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (10**9, 8 * 10**9))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 3 * 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 2 * 10**9)
    with pytest.raises(UserError, match=r"needs 3\.0 GB, but cuda has 2\.0 GB of free memory"):
        allocate(10**9, 3, device=torch.device("cuda"))
