from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms as v1
from torchvision.transforms import InterpolationMode

from tests.folders import picture
from trainer.data.augment import (
    Augmentation,
    Normalize,
    Preprocessing,
    apply_seeded,
    eval_transform,
    to_array,
    train_transform,
)

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RECIPE = Preprocessing(
    image_size=224, resize_size=256, resize="squash", interpolation="bilinear", mean=MEAN, std=STD
)
SIZES = [(500, 375), (375, 500), (256, 256), (224, 100), (1, 1), (1000, 30)]


def preprocessing(**changes: object) -> Preprocessing:
    from dataclasses import replace

    return replace(RECIPE, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("size", SIZES)
def test_the_recipes_test_transform(size: tuple[int, int]) -> None:
    image = picture(1, size=size)
    reference = v1.Compose([v1.Resize([256, 256]), v1.CenterCrop(224)])
    found = eval_transform(RECIPE)(image)
    assert found.size == (224, 224)
    assert np.array_equal(found, reference(image))


@pytest.mark.parametrize("size", SIZES[:4])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_shorter_side_keeps_the_proportions(size: tuple[int, int], interpolation: str) -> None:
    image = picture(2, size=size)
    mode = InterpolationMode(interpolation)
    reference = v1.Compose([v1.Resize(40, interpolation=mode), v1.CenterCrop(32)])
    asked = preprocessing(image_size=32, resize_size=40, resize="shorter", interpolation=interpolation)
    assert np.array_equal(eval_transform(asked)(image), reference(image))


@pytest.mark.parametrize("size", SIZES)
def test_the_recipes_training_transform_draws_as_torchvision_does(size: tuple[int, int]) -> None:
    image = picture(3, size=size)
    reference = v1.Compose([v1.RandomResizedCrop(224), v1.RandomHorizontalFlip()])
    transform = train_transform(RECIPE, "basic", (0.08, 1.0))
    for seed in range(10):
        torch.manual_seed(seed)
        expected = reference(image)
        assert np.array_equal(apply_seeded(transform, image, seed), expected)


@pytest.mark.parametrize("augment", ["basic", "trivialaugment", "randaugment", "augmix"])
def test_a_seed_fixes_the_training_transform_and_torchs_own_state_stays(augment: Augmentation) -> None:
    image = picture(4, size=(120, 90))
    transform = train_transform(preprocessing(image_size=32, resize_size=36), augment, (0.3, 1.0))
    torch.manual_seed(0)
    before = torch.get_rng_state()
    first = [to_array(apply_seeded(transform, image, seed)) for seed in range(6)]
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(7)
    again = [to_array(apply_seeded(transform, image, seed)) for seed in range(6)]
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    assert all(array.shape == (32, 32, 3) and array.dtype == np.uint8 for array in first)
    assert len({array.tobytes() for array in first}) == 6


def test_without_augmentation_training_images_are_as_test_images() -> None:
    image = picture(5, size=(80, 60))
    transform = train_transform(RECIPE, "none", (0.08, 1.0))
    assert np.array_equal(apply_seeded(transform, image, 1), eval_transform(RECIPE)(image))


def test_each_policy_changes_what_the_recipe_alone_would_give() -> None:
    image = picture(4, size=(120, 90))
    small = preprocessing(image_size=32, resize_size=36)

    def pictures(augment: Augmentation) -> list[np.ndarray]:
        transform = train_transform(small, augment, (0.3, 1.0))
        return [to_array(apply_seeded(transform, image, seed)) for seed in range(12)]

    recipe = pictures("basic")
    for augment in ("trivialaugment", "randaugment", "augmix"):
        changed = [not np.array_equal(a, b) for a, b in zip(pictures(augment), recipe, strict=True)]
        assert sum(changed) >= 8, f"{augment}: the same crop and flip, then some more"


@pytest.mark.parametrize("augment", ["none", "basic", "augmix"])
def test_erasing_makes_a_rectangle_the_models_zero_and_leaves_the_rest(augment: Augmentation) -> None:
    image = picture(6, size=(120, 90))
    small = preprocessing(image_size=32, resize_size=36)
    plain = train_transform(small, augment, (0.3, 1.0))
    erasing = train_transform(small, augment, (0.3, 1.0), random_erasing=1.0)
    rectangles = set()
    for seed in range(20):
        before, after = (to_array(apply_seeded(transform, image, seed)) for transform in (plain, erasing))
        rows, columns = np.nonzero((before != after).any(axis=2))
        box = slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)
        assert (after[box] == [124, 116, 104]).all(), "ImageNet's mean colour"
        area = (rows.max() + 1 - rows.min()) * (columns.max() + 1 - columns.min())
        assert 0.01 < area / 32**2 < 0.37
        rectangles.add((rows.min(), rows.max(), columns.min(), columns.max()))
        erased = Normalize(RECIPE, torch.device("cpu"))(
            torch.from_numpy(after[box].copy()).permute(2, 0, 1)[None]
        )
        assert erased.abs().max() < 0.5 / 255 / min(STD), "half a grey level"
        assert np.array_equal(after, to_array(apply_seeded(erasing, image, seed)))
    assert len(rectangles) == 20


def test_erasing_comes_as_often_as_asked_and_colours_out_of_range_are_clipped() -> None:
    black = Image.new("RGB", (40, 40))
    odd = preprocessing(image_size=32, resize_size=32, mean=(1.5, 0.5, -1.0))
    transform = train_transform(odd, "basic", (0.5, 1.0), random_erasing=0.25)
    pictures = [to_array(apply_seeded(transform, black, seed)) for seed in range(400)]
    assert 70 < sum(picture.any() for picture in pictures) < 130
    assert {tuple(pixel) for picture in pictures for pixel in picture.reshape(-1, 3).tolist()} == {
        (0, 0, 0),
        (255, 128, 0),
    }


def test_the_crop_covers_what_it_is_told_to() -> None:
    halves = Image.fromarray(np.repeat(np.arange(100, dtype=np.uint8)[None, :, None], 100, 0).repeat(3, 2))
    transform = train_transform(preprocessing(image_size=50, resize_size=50), "basic", (1.0, 1.0))
    spans = [np.ptp(np.asarray(apply_seeded(transform, halves, seed))) for seed in range(20)]
    assert min(spans) > 80  # nearly all of the picture's width, whatever the aspect ratio


@pytest.mark.parametrize("channels_last", [False, True])
def test_normalising_is_to_tensor_and_normalize(channels_last: bool) -> None:
    images = [eval_transform(RECIPE)(picture(seed, size=(300, 200))) for seed in range(3)]
    reference = torch.stack([v1.Compose([v1.ToTensor(), v1.Normalize(MEAN, STD)])(image) for image in images])
    batch = torch.from_numpy(np.stack([to_array(image) for image in images])).permute(0, 3, 1, 2)
    batch = batch if channels_last else batch.contiguous()
    found = Normalize(RECIPE, torch.device("cpu"))(batch)
    torch.testing.assert_close(found, reference, atol=1e-6, rtol=0)
    assert found.dtype == torch.float32
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert found.is_contiguous(memory_format=layout)


def test_normalising_an_empty_share() -> None:
    empty = torch.empty(0, 3, 8, 8, dtype=torch.uint8)
    assert Normalize(RECIPE, torch.device("cpu"))(empty).shape == (0, 3, 8, 8)


FIELDS = {
    "image_size": 224,
    "resize_size": 256,
    "resize": "squash",
    "interpolation": "bilinear",
    "mean": list(MEAN),
    "std": list(STD),
}


def test_a_preprocessing_is_read_from_its_fields() -> None:
    assert Preprocessing.from_fields(FIELDS) == RECIPE


@pytest.mark.parametrize(
    "wrong",
    [
        {"image_size": 0},
        {"image_size": "224"},
        {"resize_size": 9000},
        {"resize": "stretch"},
        {"interpolation": "lanczos"},
        {"mean": [0.5, 0.5]},
        {"mean": [0.5, 0.5, float("nan")]},
        {"std": [0.2, 0.2, 0.0]},
        {"std": "abc"},
        {"std": None},
    ],
)
def test_fields_out_of_their_range_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        Preprocessing.from_fields({**FIELDS, **wrong})
    missing = {key: value for key, value in FIELDS.items() if key not in wrong}
    with pytest.raises(KeyError):
        Preprocessing.from_fields(missing)


@pytest.mark.shared
def test_the_recipes_test_transform_on_real_photographs(shared: Path) -> None:
    reference = v1.Compose([v1.Resize([256, 256]), v1.CenterCrop(224)])
    for path in sorted((shared / "data" / "hymenoptera" / "val" / "bees").iterdir())[:5]:
        image = Image.open(path).convert("RGB")
        assert np.array_equal(eval_transform(RECIPE)(image), reference(image))
