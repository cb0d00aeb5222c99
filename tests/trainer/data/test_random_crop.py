import itertools

import numpy as np
import pytest
import torch
from torchvision.transforms import InterpolationMode, v2
from torchvision.transforms import functional as pil

from tests.folders import noise_image
from trainer.data.random_crop import Box, flip, resized_crop, sample_crop, sample_erasing

MODES = (InterpolationMode.BILINEAR, InterpolationMode.BICUBIC)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def channels_last(image: np.ndarray) -> torch.Tensor:
    return torch.tensor(image).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(375, 500), (40, 30), (1, 1), (2, 3), (1000, 30), (30, 1000)])
@pytest.mark.parametrize("scale", [(0.08, 1.0), (1.0, 1.0), (1e-6, 1e-5)])
def test_draws_are_those_of_torchvision(size: tuple[int, int], scale: tuple[float, float]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    crop, mirror = v2.RandomResizedCrop(8, scale=scale), v2.RandomHorizontalFlip()
    for seed in range(50):
        box, flipped = sample_crop(*size, scale, seeded(seed))
        torch.manual_seed(seed)
        assert box._asdict() == crop.make_params([image])
        side = torch.tensor([[[0, 1]]])
        assert (mirror(side)[0, 0, 0] == 1) == flipped


@pytest.mark.parametrize("size", [(224, 224), (5, 5), (1, 1)])
def test_erased_rectangles_are_those_of_torchvision(size: tuple[int, int]) -> None:
    image = torch.zeros(3, *size, dtype=torch.uint8)
    erasing = v2.RandomErasing(0.5, value=[255.0, 255.0, 255.0])  # type: ignore[arg-type]
    for seed in range(100):
        box = sample_erasing(*size, 0.5, seeded(seed))
        erased = np.zeros(size)
        if box is not None:
            erased[box.slices] = 255
        torch.manual_seed(seed)
        assert np.array_equal(erasing(image)[0], erased)


@pytest.mark.parametrize("mode", MODES)
def test_crops_are_resized_as_by_torchvision_and_within_2_gray_levels_of_pillow(mode: InterpolationMode) -> None:
    picture = noise_image(1, size=(300, 200))
    image = np.asarray(picture)
    boxes = [Box(0, 0, 200, 300), Box(199, 0, 1, 300), Box(0, 299, 200, 1), Box(50, 60, 64, 64), Box(7, 9, 20, 31)]
    for box, size in itertools.product(boxes, (64, 33)):
        result = resized_crop(image, box, size, mode)
        assert result.shape == (size, size, 3)
        assert result.flags.c_contiguous
        assert result.flags.writeable
        resized = v2.functional.resized_crop(channels_last(image), *box, [size, size], mode)
        assert np.array_equal(result, resized.permute(1, 2, 0))
        expected = np.asarray(pil.resized_crop(picture, *box, [size, size], mode), dtype=np.int16)
        assert np.abs(result - expected).max() <= 2


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (7, 1), (224, 224), (20000, 2)])
def test_flip_mirrors_from_left_to_right(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    assert np.array_equal(flip(image), image[:, ::-1])
