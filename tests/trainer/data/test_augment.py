from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode, v2

from tests.folders import noise_image
from trainer.data.augment import Augmentation, EvalTransform, Normalize, TrainTransform
from trainer.data.preprocessing import Preprocessing

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
D2L = Preprocessing(image_size=224, resize_size=256, resize="squash", interpolation="bilinear", mean=MEAN, std=STD)
SMALL = replace(D2L, image_size=32, resize_size=36)
POLICIES: tuple[Augmentation, ...] = ("trivialaugment", "randaugment", "augmix")


def torchvision_policy(augment: Augmentation) -> v2.Transform:
    policies = {"trivialaugment": v2.TrivialAugmentWide, "randaugment": v2.RandAugment, "augmix": v2.AugMix}
    return policies[augment](interpolation=InterpolationMode.BILINEAR)


def augmented(
    preprocessing: Preprocessing, augment: Augmentation, image: Image.Image, count: int, **options: float
) -> list[np.ndarray]:
    """Return the image augmented with seeds 0 to `count` - 1."""
    transform = TrainTransform(preprocessing, augment, (0.3, 1.0), **options)
    return [transform(np.asarray(image), torch.Generator().manual_seed(seed)) for seed in range(count)]


@pytest.mark.parametrize("size", [(375, 500), (224, 100)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_resize_shorter_keeps_the_aspect_ratio(size: tuple[int, int], interpolation: str) -> None:
    image = noise_image(2, size=size)
    mode = InterpolationMode(interpolation)
    reference = v1.Compose([v1.Resize(40, interpolation=mode), v1.CenterCrop(32)])
    shorter = replace(SMALL, resize_size=40, resize="shorter", interpolation=interpolation)  # type: ignore[arg-type]
    assert np.array_equal(EvalTransform(shorter)(np.asarray(image)), reference(image))


@pytest.mark.parametrize("size", [(5045, 5), (5, 5045), (3301, 3)])
def test_the_ends_of_an_elongated_image_are_not_resized(size: tuple[int, int]) -> None:
    image = noise_image(2, size=size)
    shorter = replace(SMALL, resize_size=40, resize="shorter")
    expected = np.asarray(v1.Compose([v1.Resize(40), v1.CenterCrop(32)])(image), dtype=np.int16)
    assert np.abs(EvalTransform(shorter)(np.asarray(image)) - expected).max() <= 1, "gray level"
    assert EvalTransform(shorter)(np.zeros((10_000_000, 1, 3), np.uint8)).shape == (32, 32, 3), "400 million pixels"


@pytest.mark.parametrize("size", [(500, 375), (256, 256), (224, 100), (1, 1), (30, 1000)])
def test_transforms_are_those_of_the_d2l_recipe(size: tuple[int, int]) -> None:
    image = noise_image(3, size=size)
    reference = v1.Compose([v1.Resize([256, 256]), v1.CenterCrop(224)])
    assert np.array_equal(EvalTransform(D2L)(np.asarray(image)), reference(image))
    reference = v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()])
    transform = TrainTransform(D2L, "basic", (0.08, 1.0))
    for seed in range(10):
        torch.manual_seed(seed)
        expected = np.asarray(reference(image), dtype=np.int16)
        result = transform(np.asarray(image), torch.Generator().manual_seed(seed))
        assert np.abs(result - expected).max() <= 2, "gray levels: the recipe resizes with Pillow"


@pytest.mark.parametrize("augment", POLICIES)
def test_policies_and_erasing_are_those_of_torchvision(augment: Augmentation) -> None:
    """Given the same generator, a policy sees the same crop, and what follows continues its draws."""
    image, policy = np.asarray(noise_image(7, size=(90, 70))), torchvision_policy(augment)
    crop = TrainTransform(SMALL, "basic", (0.3, 1.0))
    transform = TrainTransform(SMALL, augment, (0.3, 1.0), random_erasing=0.5)
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        cropped = Image.fromarray(crop(image, generator))
        torch.default_generator.set_state(generator.get_state())
        expected = v2.Compose([policy, v2.RandomErasing(0.5, value=[124.0, 116.0, 104.0])])(cropped)  # type: ignore[arg-type]
        assert np.array_equal(transform(image, torch.Generator().manual_seed(seed)), expected)


@pytest.mark.parametrize("augment", ["basic", *POLICIES])
def test_augmentation_depends_on_the_seed_only(augment: Augmentation) -> None:
    image = noise_image(4, size=(120, 90))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = augmented(SMALL, augment, image, 8)
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    assert np.array_equal(first, augmented(SMALL, augment, image, 8))
    assert all(array.shape == (32, 32, 3) and array.dtype == np.uint8 for array in first)
    assert len({array.tobytes() for array in first}) == 8
    if augment != "basic":
        basic = augmented(SMALL, "basic", image, 8)
        assert sum(not np.array_equal(a, b) for a, b in zip(first, basic, strict=True)) >= 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("augment", ["none", "basic", "augmix"])
def test_a_read_only_view_is_transformed_without_a_warning_and_not_changed(augment: Augmentation) -> None:
    image = np.asarray(noise_image(8, size=(50, 40)))
    image.flags.writeable = False
    before = image.copy()
    transform = TrainTransform(SMALL, augment, (1.0, 1.0), random_erasing=1.0)
    for seed in range(4):
        assert transform(image, torch.Generator().manual_seed(seed)).shape == (32, 32, 3)
    assert np.array_equal(image, before)


def test_without_augmentation_training_images_equal_evaluation_images() -> None:
    image = noise_image(5, size=(80, 60))
    (result,) = augmented(D2L, "none", image, 1)
    assert np.array_equal(result, EvalTransform(D2L)(np.asarray(image)))


def test_crop_scale_of_1_crops_the_whole_width() -> None:
    gradient = np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2)
    transform = TrainTransform(SMALL, "basic", (1.0, 1.0))
    assert min(np.ptp(transform(gradient, torch.Generator().manual_seed(seed))) for seed in range(20)) > 80


@pytest.mark.parametrize("augment", ["none", "basic", "augmix"])
def test_random_erasing_sets_a_rectangle_to_the_mean(augment: Augmentation) -> None:
    image = noise_image(6, size=(120, 90))
    rectangles = set()
    erased = augmented(SMALL, augment, image, 8, random_erasing=1.0)
    for before, after in zip(augmented(SMALL, augment, image, 8), erased, strict=True):
        rows, columns = np.nonzero((before != after).any(axis=2))
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        assert (after[box] == [124, 116, 104]).all(), "ImageNet's mean"
        height, width = after[box].shape[:2]
        assert 0.01 < height * width / 32**2 < 0.37
        rectangles.add((rows.min(), rows.max(), columns.min(), columns.max()))
        batch = torch.from_numpy(after[box].copy()).permute(2, 0, 1)[None]
        assert Normalize(D2L, torch.device("cpu"))(batch).abs().max() < 0.5 / 255 / min(STD), "half a gray level"
    assert len(rectangles) == 8


def test_random_erasing_has_its_probability_and_clips_the_mean() -> None:
    odd = replace(SMALL, mean=(1.5, 0.5, -1.0))
    images = augmented(odd, "basic", Image.new("RGB", (40, 40)), 400, random_erasing=0.25)
    assert 70 < sum(image.any() for image in images) < 130
    colors = {tuple(pixel) for image in images for pixel in image.reshape(-1, 3).tolist()}
    assert colors == {(0, 0, 0), (255, 128, 0)}


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalize_equals_to_tensor_and_normalize_of_torchvision(channels_last: bool) -> None:
    images = [EvalTransform(D2L)(np.asarray(noise_image(seed, size=(300, 200)))) for seed in range(3)]
    reference = torch.stack([v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])(image) for image in images])
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    result = Normalize(D2L, torch.device("cpu"))(batch if channels_last else batch.contiguous())
    torch.testing.assert_close(result, reference, atol=1e-6, rtol=0)
    assert result.dtype == torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert result.is_contiguous(memory_format=layout)
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert Normalize(D2L, torch.device("cpu"))(empty).shape == (0, 3, 8, 8)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("image_size", value) for value in (0, "224")),
        *(("resize_size", 9000), ("resize", "stretch"), ("interpolation", "lanczos")),
        *(("mean", value) for value in ([0.5, 0.5], [0.5, 0.5, float("nan")])),
        *(("std", value) for value in ([0.2, 0.2, 0.0], "abc", None)),
    ],
)
def test_invalid_preprocessing_fields_are_refused(field: str, value: object) -> None:
    fields = {**asdict(D2L), "mean": list(MEAN), "std": list(STD)}
    assert Preprocessing.from_fields(fields) == D2L
    with pytest.raises((ValueError, TypeError)):
        Preprocessing.from_fields({**fields, field: value})
    del fields[field]
    with pytest.raises(KeyError):
        Preprocessing.from_fields(fields)
