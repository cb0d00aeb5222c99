"""Tests that JPEG files are decoded to the pixels that Pillow decodes, and refused for the same reasons."""

import io
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import noise_image
from trainer.data import decode as decode_module
from trainer.data.decode import UnreadableImage, decode
from trainer.data.jpeg import decode_jpeg

PHOTO = Image.fromarray(
    np.stack([np.add.outer(np.arange(61) * k, np.arange(83) * (4 - k)) % 256 for k in (1, 2, 3)], 2).astype(np.uint8)
)
OPTIONS: tuple[dict[str, object], ...] = (
    {},
    {"quality": 1},
    {"quality": 100, "subsampling": "4:4:4"},
    {"subsampling": "4:2:2"},
    {"subsampling": "4:2:0", "progressive": True},
    {"subsampling": "4:1:1"},
    {"keep_rgb": True},
    {"optimize": True, "restart_marker_blocks": 3},
    {"exif": b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"},
)


def jpeg(image: Image.Image, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, format="JPEG", **options)
    return stream.getvalue()


def outcome(path: Path) -> tuple[str, tuple[int, ...], bytes]:
    """Return what decoding gives: an error, or shape and pixels."""
    try:
        pixels = decode(path)
    except UnreadableImage as error:
        return str(error), (), b""
    return "", pixels.shape, pixels.tobytes()


def outcome_of_pillow(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, tuple[int, ...], bytes]:
    with monkeypatch.context() as patch:
        patch.setattr(decode_module, "decode_jpeg", lambda opened, file: None)
        return outcome(path)


def is_decoded_here(path: Path) -> bool:
    with path.open("rb") as file, Image.open(file) as opened:
        return decode_jpeg(opened, file) is not None


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_pixels_are_those_of_pillow(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.jpg"
    for size in ((83, 61), (1, 1), (8, 16), (17, 3), (40, 40)):
        path.write_bytes(jpeg(PHOTO.resize(size), **options))
        assert is_decoded_here(path)
        assert outcome(path) == outcome_of_pillow(path, monkeypatch)
        assert outcome(path)[1] == ((size[0], size[1], 3) if "exif" in options else (size[1], size[0], 3))


@pytest.mark.parametrize("mode", ["L", "CMYK", "MPO"])
def test_other_jpeg_files_are_left_to_pillow(mode: str, tmp_path: Path) -> None:
    path = tmp_path / "x.jpg"
    if mode == "MPO":
        PHOTO.save(path, format="MPO", save_all=True, append_images=[noise_image(1, size=PHOTO.size)])
    else:
        path.write_bytes(jpeg(PHOTO.convert(mode)))
    assert not is_decoded_here(path)
    assert np.abs(decode(path).astype(int) - np.asarray(Image.open(path).convert("RGB"))).max() == 0


def test_damaged_files_have_the_outcome_of_pillow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, rng, outcomes = tmp_path / "x.jpg", random.Random(0), []
    whole = [jpeg(PHOTO, **options) for options in OPTIONS]
    for content in whole:
        for number in range(40):
            data = bytearray(content)
            if number % 4 == 0:
                del data[rng.randrange(len(data)) :]
            else:
                for _ in range(rng.choice([1, 3, 20])):
                    data[rng.randrange(rng.choice([700, len(data)]))] = rng.randrange(256)
            path.write_bytes(bytes(data) or b"\0")
            outcomes.append(outcome(path))
            assert outcomes[-1] == outcome_of_pillow(path, monkeypatch)
    errors = sum(bool(error) for error, _, _ in outcomes)
    assert 40 < errors < len(outcomes) - 40, "some files are refused, and some damaged ones are decoded"
