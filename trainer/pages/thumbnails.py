"""Small pictures within a page, as data URIs."""

import base64
import io
import math
import os
import time

import numpy as np
from PIL import Image

from trainer.data.decode import UnreadableImage, decode

_QUALITY = 74


def thumbnail(image: str | os.PathLike[str] | np.ndarray, size: int = 192) -> str:
    """Return an image as a data URI (WebP), not larger than `size` in width and height [pixels].

    Args:
        image: image file, or RGB pixels, uint8 [H, W, 3].
        size: largest width and height.

    Raises:
        UnreadableImage: the file cannot be read or decoded.

    """
    pixels = image if isinstance(image, np.ndarray) else decode(image)
    picture = Image.fromarray(np.ascontiguousarray(pixels))
    picture.thumbnail((size, size), Image.Resampling.BICUBIC, reducing_gap=2.0)
    stream = io.BytesIO()
    picture.save(stream, "WEBP", quality=_QUALITY, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


class PictureBudget:
    """Makes thumbnails until they fill a number of bytes, or take a number of seconds."""

    def __init__(self, max_bytes: int, *, max_seconds: float | None = None) -> None:
        """Take the largest sum of all data URIs [bytes], and the largest time to make them; None: no limit."""
        self.left = max_bytes
        self._seconds_left = math.inf if max_seconds is None else max_seconds

    @property
    def is_used_up(self) -> bool:
        """Return whether no more thumbnails are made."""
        return self.left <= 0 or self._seconds_left <= 0

    def thumbnail(self, image: str | os.PathLike[str] | np.ndarray, size: int = 192) -> str | None:
        """Return the data URI of an image; None if it cannot be read, or the budget is used up."""
        if self.is_used_up:
            return None
        began = time.perf_counter()
        try:
            uri = thumbnail(image, size)
        except (UnreadableImage, ValueError):
            return None
        finally:
            self._seconds_left -= time.perf_counter() - began
        if len(uri) > self.left:
            self.left = 0
            return None
        self.left -= len(uri)
        return uri
