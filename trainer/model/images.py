"""Convert images of any common form to a model's input, as the evaluation of a run does."""

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, TypeAlias, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.data.augment import EvalTransform, Normalize
from trainer.data.decode import UnreadableImage, decode, decode_file, upright_rgb
from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.text import escape_unprintable, first_line

ImageInput: TypeAlias = str | os.PathLike[str] | bytes | bytearray | memoryview | BinaryIO | np.ndarray | Image.Image
"""An image: a path, the content of a file, an open file, an array or a PIL image."""
_EXPECTED = (
    "expected a path, bytes, a file opened with mode 'rb', a PIL image, a NumPy array of uint8 [height, width] or "
    "[height, width, 3 or 4], or a list of these"
)


class Preprocess:
    """Convert images to the model's input, as the run's evaluation does."""

    def __init__(self, preprocessing: Preprocessing) -> None:
        self.preprocessing = preprocessing
        self._transform = EvalTransform(preprocessing)
        self._normalize = Normalize(preprocessing, torch.device("cpu"))

    def __call__(self, images: ImageInput | Sequence[ImageInput]) -> Tensor:
        """Return float32 [3, image_size, image_size] of an image, or [N, 3, image_size, image_size] of a list.

        Raises:
            UserError: an image cannot be read, or is of another type.

        """
        if not isinstance(images, list | tuple):
            return self._convert(cast(ImageInput, images), "the image")
        size = self.preprocessing.image_size
        converted = [self._convert(image, f"images[{number}]") for number, image in enumerate(images)]
        return torch.stack(converted) if converted else torch.empty(0, 3, size, size)

    def pixels(self, image: ImageInput, name: str = "the image") -> np.ndarray:
        """Return the resized and cropped image before its normalization: uint8 [image_size, image_size, 3].

        Args:
            image: an image.
            name: what an error message calls an image that is not a path.

        Raises:
            UserError: the image cannot be read, or is of another type.

        """
        if isinstance(image, str | os.PathLike):
            name = escape_unprintable(os.fsdecode(image))
        try:
            decoded = _read_image(image, name)
        except UnreadableImage as error:
            raise UserError(f"{name}: {error}; expected an image file") from None
        return self._transform(decoded)

    def _convert(self, image: ImageInput, name: str) -> Tensor:
        array = torch.tensor(self.pixels(image, name))
        return self._normalize(array.permute(2, 0, 1)[None])[0]


def _read_image(image: ImageInput, name: str) -> np.ndarray:
    """Return the upright image, uint8 [H, W, 3]."""
    if isinstance(image, Image.Image):
        try:
            return upright_rgb(image)
        except UnreadableImage:
            raise
        except Exception as error:  # noqa: BLE001 (a closed image, or a damaged file, which Pillow reads only now)
            raise UserError(f"{name} cannot be read ({first_line(error)}): {_EXPECTED}") from None
    if isinstance(image, str | os.PathLike):
        return decode(Path(image).expanduser())
    if isinstance(image, bytes | bytearray | memoryview):
        return _decode_content(image)
    if isinstance(image, np.ndarray):
        return upright_rgb(_from_array(image, name))
    try:
        content = image.read() if hasattr(image, "read") else None
    except (OSError, ValueError) as error:  # a closed file, or one opened with another mode
        raise UserError(f"{name} cannot be read ({error}): {_EXPECTED}") from None
    if not isinstance(content, bytes):
        raise UserError(f"{name} is of type {type(image).__name__}: {_EXPECTED}")
    return _decode_content(content)


def _decode_content(content: bytes | bytearray | memoryview) -> np.ndarray:
    if not content:
        raise UnreadableImage("empty (0 bytes)")
    return decode_file(io.BytesIO(content), "").pixels


def _from_array(array: np.ndarray, name: str) -> Image.Image:
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[..., 0]
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in {3, 4})
    if array.dtype != np.uint8 or not is_image or not array.size:
        raise UserError(f"{name} is an array of {array.dtype} {list(array.shape)}: {_EXPECTED}")
    return Image.fromarray(np.ascontiguousarray(array))
