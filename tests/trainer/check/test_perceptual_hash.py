"""The perceptual hash: what it finds, and what it leaves alone."""

import numpy as np
import pytest
from PIL import Image

from tests.trainer.check.planted import EDITS, picture
from trainer.check.alignment import SIZE
from trainer.check.perceptual_hash import find_near_duplicates, hash_thumbnails


def thumbnail(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.HAMMING))


def test_the_hash_of_the_mirrored_image_needs_no_mirroring() -> None:
    thumbnails = np.stack([thumbnail(picture(seed)) for seed in range(5)])
    hashes, mirrored = hash_thumbnails(thumbnails)
    assert len({*hashes.tolist(), *mirrored.tolist()}) == 10
    assert np.bitwise_count(hash_thumbnails(thumbnails[:, :, ::-1])[0] ^ mirrored).max() <= 2  # ties with the median


@pytest.mark.parametrize("edit", EDITS)
def test_edited_copies_are_near_duplicates_and_other_pictures_are_not(edit: str) -> None:
    random = np.random.default_rng(0)
    pictures = [picture(seed) for seed in range(20)]
    copies = [EDITS[edit](image, random) for image in pictures]
    pairs = set(find_near_duplicates(np.stack([thumbnail(image) for image in (*pictures, *copies)])))
    assert pairs == {(number, number + 20) for number in range(20)}


def test_images_of_one_color_or_noise_have_no_near_duplicates() -> None:
    random = np.random.default_rng(0)
    plain = np.full((5, SIZE, SIZE, 3), 128, dtype=np.uint8)
    almost_plain = plain + random.integers(0, 2, plain.shape, dtype=np.uint8)
    noise = random.integers(0, 256, (20, SIZE, SIZE, 3), dtype=np.uint8)
    assert list(find_near_duplicates(np.concatenate([plain, almost_plain, noise]))) == []
    assert list(find_near_duplicates(np.empty((0, SIZE, SIZE, 3), dtype=np.uint8))) == []


def test_pictures_that_differ_in_color_alone_are_not_near_duplicates() -> None:
    original = thumbnail(picture(1))
    assert list(find_near_duplicates(np.stack([original, original[..., ::-1]]))) == []


def test_a_large_group_is_connected_by_few_pairs() -> None:
    copies = np.repeat(thumbnail(picture(1))[None], 300, axis=0)
    pairs = list(find_near_duplicates(copies))
    assert len(pairs) == 299
