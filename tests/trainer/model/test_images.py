import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import functional

from trainer.data.augment import EvalTransform, Normalize
from trainer.data.dataset import ImageDataset
from trainer.data.preprocessing import Preprocessing
from trainer.data.sampler import SampleKey
from trainer.errors import UserError
from trainer.model.images import Preprocess

PREPROCESSING = Preprocessing(
    image_size=16, resize_size=18, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
)


def make_image(seed: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def preprocess() -> Preprocess:
    return Preprocess(PREPROCESSING)


FORMS: dict[str, Callable[[Path], Any]] = {
    "Path": lambda path: path,
    "str": str,
    "bytes": Path.read_bytes,
    "bytearray": lambda path: bytearray(path.read_bytes()),
    "file": lambda path: path.open("rb"),
    "BytesIO": lambda path: io.BytesIO(path.read_bytes()),
    "array": lambda path: np.asarray(Image.open(path)),
    "read-only view": lambda path: np.asarray(Image.open(path))[::-1][::-1],
    "PIL": Image.open,
}


@pytest.mark.parametrize("form", FORMS)
def test_an_image_of_any_form_gives_the_same_input(form: str, preprocess: Preprocess, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    make_image(1).save(path)
    expected = preprocess(make_image(1))
    assert (expected.shape, expected.dtype) == ((3, 16, 16), torch.float32)
    assert torch.equal(preprocess(FORMS[form](path)), expected)
    other = make_image(2)
    for images in ([FORMS[form](path), other], (FORMS[form](path), other)):
        assert torch.equal(preprocess(images), torch.stack([expected, preprocess(other)]))
    assert preprocess([]).shape == (0, 3, 16, 16)


@pytest.mark.parametrize(("resize", "interpolation"), [("squash", "bilinear"), ("shorter", "bicubic")])
def test_the_input_equals_that_of_the_evaluation(tmp_path: Path, resize: Any, interpolation: Any) -> None:
    preprocessing = replace(PREPROCESSING, resize=resize, interpolation=interpolation)
    image, path = make_image(5, size=(100, 80)), tmp_path / "image.png"
    image.save(path)
    result = Preprocess(preprocessing)(path)
    # The run's loader and evaluation:
    dataset = ImageDataset([(str(path), 0)], EvalTransform(preprocessing), seed=0)
    array, _, _ = dataset[SampleKey(0, 0)]
    batch = torch.tensor(array)[None].permute(0, 3, 1, 2)
    assert torch.equal(result, Normalize(preprocessing, torch.device("cpu"))(batch)[0])
    # torchvision's functions:
    size = [18, 18] if resize == "squash" else [18]
    resized = functional.resize(image, size, functional.InterpolationMode(interpolation), antialias=True)
    cropped = functional.to_tensor(functional.center_crop(resized, [16]))
    expected = functional.normalize(cropped, list(PREPROCESSING.mean), list(PREPROCESSING.std))
    torch.testing.assert_close(result, expected, rtol=0, atol=2e-6)


def test_a_path_may_start_with_the_home_folder(
    preprocess: Preprocess, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_image(1).save(tmp_path / "image.png")
    assert torch.equal(preprocess("~/image.png"), preprocess(make_image(1)))


def test_gray_and_transparent_arrays_are_images(preprocess: Preprocess) -> None:
    gray = np.asarray(make_image(3).convert("L"))
    assert torch.equal(preprocess(gray), preprocess(Image.fromarray(gray)))
    assert torch.equal(preprocess(gray[..., None]), preprocess(gray))
    rgba = np.dstack([np.asarray(make_image(3)), np.full((30, 40), 128, np.uint8)])
    assert torch.equal(preprocess(rgba), preprocess(Image.fromarray(rgba)))


EXPECTED = (
    "expected a path, bytes, a file opened with mode 'rb', a PIL image, a NumPy array of uint8 [height, width] or "
    "[height, width, 3 or 4], or a list of these"
)
OTHERS: dict[str, tuple[Any, str]] = {
    "None": (None, "of type NoneType"),
    "int": (3, "of type int"),
    "dict": ({}, "of type dict"),
    "tensor": (torch.zeros(3, 8, 8, dtype=torch.uint8), "of type Tensor"),
    "text file": (io.StringIO("x"), "of type StringIO"),
    "nested list": ([["x.png"]], "of type list"),
    "floats": (np.zeros((8, 8, 3)), "an array of float64 [8, 8, 3]"),
    "channels first": (np.zeros((3, 8, 8), np.uint8), "an array of uint8 [3, 8, 8]"),
    "a batch": (np.zeros((2, 8, 8, 3), np.uint8), "an array of uint8 [2, 8, 8, 3]"),
    "no pixels": (np.zeros((0, 8, 3), np.uint8), "an array of uint8 [0, 8, 3]"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_anything_else_is_an_error_that_lists_what_is_taken(kind: str, preprocess: Preprocess) -> None:
    value, what = OTHERS[kind]
    name = "images[0]" if isinstance(value, list) else "the image"
    with pytest.raises(UserError) as error:
        preprocess(value)
    assert str(error.value) == f"{name} is {what}: {EXPECTED}"


def test_a_closed_or_damaged_file_or_image_is_an_error(preprocess: Preprocess, tmp_path: Path) -> None:
    make_image(1).save(tmp_path / "image.png")
    content = (tmp_path / "image.png").read_bytes()
    with pytest.raises(UserError, match=r"images\[1\] cannot be read \(.*truncated.*expected a path"):
        preprocess([content, Image.open(io.BytesIO(content[: len(content) // 2]))])  # which Pillow has not read yet
    for path in ("null\0byte.png", "\ud800.png"):
        with pytest.raises(UserError, match=r"png: cannot be opened \(.*expected an image file"):
            preprocess(path)
    for closed in (io.BytesIO(), Image.open(tmp_path / "image.png")):
        closed.close()
        with pytest.raises(UserError, match=r"the image cannot be read \(.* closed .*expected a path"):
            preprocess(closed)


IMAGES: dict[str, Callable[[Image.Image], Image.Image]] = {
    "gray": lambda image: image.convert("L"),
    "palette": lambda image: image.quantize(16),
    "alpha": lambda image: Image.merge("RGBA", (*image.split(), image.convert("L"))),
    "16 bits": lambda image: Image.fromarray(np.asarray(image.convert("L")).astype(np.uint16) * 257),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_a_pil_image_gives_the_same_result_as_its_file(preprocess: Preprocess, tmp_path: Path, kind: str) -> None:
    image, path, exif = IMAGES[kind](make_image(6)), tmp_path / "image.png", Image.Exif()
    exif[0x0112] = 6  # Orientation: rotate by 90 degrees clockwise
    image.transpose(Image.Transpose.ROTATE_90).save(path, exif=exif)
    before = (image.mode, image.tobytes())
    assert torch.equal(preprocess(image), preprocess(path))
    assert (image.mode, image.tobytes()) == before
    with Image.open(path) as opened:
        assert torch.equal(preprocess(opened), preprocess(image))


def test_an_unreadable_image_is_an_error_with_its_path(preprocess: Preprocess, tmp_path: Path) -> None:
    (tmp_path / "text.jpg").write_text("hello")
    reasons = {"text.jpg": "a text file, not an image", "none.jpg": "no such file", "": "a folder, not a file"}
    for name, reason in reasons.items():
        with pytest.raises(UserError) as error:
            preprocess(tmp_path / name)
        assert str(error.value) == f"{tmp_path / name}: {reason}; expected an image file"
    with pytest.raises(UserError, match="the image: gray values that are not finite"):
        preprocess(Image.fromarray(np.full((4, 4), np.nan, dtype=np.float32)))
    for content, reason in ((b"", "empty"), (b"hello", "a text file, not an image")):
        with pytest.raises(UserError, match=rf"^images\[1\]: {reason}"):
            preprocess([make_image(1), content])
