"""Decode an image file to the pixels of an upright RGB image, or raise `UnreadableImage` with the reason.

Only regular files in the formats of `image_formats` are opened. Pillow supports other formats, one of which (EPS)
starts another program.
"""

import ctypes
import hashlib
import logging
import os
import re
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO, NamedTuple

import numpy as np
import PIL
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError, _imaging

from trainer.data.image_formats import HEIF_VERSION, TiffKind, describe_unidentified, formats_for, read_tiff_kind
from trainer.data.jpeg import SIMPLEJPEG_VERSION, decode_jpeg
from trainer.data.pixels import to_rgb
from trainer.data.sample_format import SampleFormat, UnreadableImage, read_sample_format
from trainer.text import escape_unprintable

__all__ = [
    "DecodedImage",
    "UnreachableImage",
    "UnreadableImage",
    "decode",
    "decode_file",
    "decoder_version",
    "exif_transpose",
    "hash_file",
    "open_image_file",
    "upright_rgb",
]

DECODE_VERSION = 2
"""Increment it when other files are accepted, or decoded to other pixels: it invalidates what is cached."""

_NOT_SUPPORTED = re.compile(r"unsupported|not supported|unknown|cannot handle|not available", re.IGNORECASE)
_TRANSPOSE = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

logging.getLogger("PIL").addHandler(logging.NullHandler())  # without a handler, errors are printed to stderr


def _silence_libtiff() -> None:
    """Stop libtiff, which Pillow uses for TIFF files, from printing to the console."""
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):  # Pillow is built with a static libtiff or without it
        return
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


_silence_libtiff()


class UnreachableImage(UnreadableImage):
    """The file could not be opened or read: missing, no permission, an I/O error. The reason may be temporary."""


class DecodedImage(NamedTuple):
    """An upright RGB image."""

    pixels: np.ndarray
    """uint8 [H, W, 3]; it may be read-only."""
    conversions: tuple[str, ...]
    """What was done to its pixels, where the file left a choice."""


def decoder_version() -> str:
    """Return the version of the decoder; validation results and images that another version has cached are ignored."""
    return f"{DECODE_VERSION}, Pillow {PIL.__version__}, pillow-heif {HEIF_VERSION}, simplejpeg {SIMPLEJPEG_VERSION}"


def decode(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the image in a file: RGB, uint8 [H, W, 3], upright according to its EXIF orientation.

    Transparent pixels are composited over white. Samples of more than 8 bits are scaled to 8 bits, see `pixels`. The
    first frame of an animation is returned. Color profiles are not applied, as in torchvision.

    Raises:
        UnreadableImage: not a regular file, not an image in one of the formats, or a damaged image.

    """
    with open_image_file(path) as file:
        return decode_file(file, path).pixels


def decode_file(file: BinaryIO, path: str | os.PathLike[str]) -> DecodedImage:
    """Return the image in the file at `path`, which is open, as `decode` does, and what was done to its pixels."""
    tiff = None
    with _ignore_warnings:
        try:
            with Image.open(file, formats=formats_for(os.fspath(path))) as stored:
                if (pixels := decode_jpeg(stored, file)) is not None:
                    operation = exif_transpose(stored)
                    return DecodedImage(pixels if operation is None else _transpose(pixels, operation), ())
                tiff = read_tiff_kind(file) if isinstance(stored, TiffImagePlugin.TiffImageFile) else None
                samples = read_sample_format(stored, file)
                stored.load()
                operation = exif_transpose(stored)
                rgb = to_rgb(stored, samples, file)
                upright = rgb.image if operation is None else rgb.image.transpose(operation)
                return DecodedImage(np.asarray(upright), rgb.conversions)
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage(describe_unidentified(file)) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise UnreadableImage(f"more than {limit:,} pixels: rejected as a decompression bomb") from None
        except MemoryError:
            raise UnreachableImage("not enough memory for its pixels") from None
        except Exception as error:  # noqa: BLE001 (a decoder may raise anything for a damaged file)
            if isinstance(error, OSError) and error.errno:
                raise UnreachableImage(f"cannot be read ({error.strerror})") from None
            raise UnreadableImage(_short_reason(error, tiff)) from None


def upright_rgb(image: Image.Image) -> np.ndarray:
    """Convert an opened image as `decode` does.

    Raises:
        UnreadableImage: pixel values that cannot be converted to 8 bits.

    """
    operation = exif_transpose(image)
    rgb = to_rgb(image, SampleFormat()).image
    return np.asarray(rgb if operation is None else rgb.transpose(operation))


def _transpose(pixels: np.ndarray, operation: Image.Transpose) -> np.ndarray:
    # Pillow copies pixels of four bytes, which is faster than NumPy's copy of three.
    return np.asarray(Image.fromarray(pixels).transpose(operation))


class _IgnoreWarnings:
    """Ignore Pillow's warnings (large images, unusual metadata) in any number of threads.

    All threads share Python's warning filters: the first thread to enter changes them, the last to leave
    restores them.
    """

    def __init__(self) -> None:
        self._lock, self._threads = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._threads:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._threads += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._threads -= 1
            if not self._threads:
                self._filters.__exit__(None, None, None)


_ignore_warnings = _IgnoreWarnings()


@contextmanager
def open_image_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file that is not empty."""
    try:
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size == 0:
            raise UnreadableImage("an empty file (0 bytes)")
        # O_NONBLOCK: if a pipe replaces the file just now, opening it must not wait for a writer.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    except FileNotFoundError:
        reason = "a broken symbolic link" if os.path.islink(path) else "no such file"  # noqa: PTH114
        raise UnreachableImage(reason) from None
    except (OSError, ValueError) as error:  # ValueError: a null byte, or a character that no file name can have
        raise UnreachableImage(f"cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    with file:
        yield file


def hash_file(file: BinaryIO) -> str:
    """Return the hash of the content of an open file, 16 hexadecimal digits.

    Raises:
        UnreachableImage: it cannot be read.

    """
    try:
        digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=8))  # type: ignore[arg-type]
    except OSError as error:
        raise UnreachableImage(f"cannot be read ({error.strerror})") from None
    return digest.hexdigest()


def exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that makes the image upright; None if there is none or the metadata is damaged.

    Pillow's `exif_transpose` also rewrites the metadata and fails if it is damaged.
    """
    try:
        return _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (as above)
        return None


def _short_reason(error: Exception, tiff: TiffKind | None) -> str:
    text = escape_unprintable(str(error).strip())[:100] or type(error).__name__
    if _NOT_SUPPORTED.search(text):
        return f"not supported ({text}): convert it to JPEG or PNG"
    if tiff is not None and not tiff.has_basic_compression:
        return f"damaged or a TIFF that is not supported ({tiff.description}): convert it to JPEG or PNG"
    return "damaged: its pixels cannot be decoded" if text.startswith("decoder error") else f"damaged: {text}"
