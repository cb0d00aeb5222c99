"""Decode an image file to an upright RGB image, or raise `UnreadableImage` with the reason.

Only regular files in the formats below are opened, whatever their file extension. Pillow supports other formats,
one of which (EPS) starts another program.
"""

import codecs
import ctypes
import logging
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import BinaryIO

import numpy as np

# Importing a plugin registers its decoder. This is done here because registration is not thread-safe.
# The JPEG plugin also opens MPO files, which hold several images.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    ExifTags,
    GifImagePlugin,  # noqa: F401
    Image,
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TiffImagePlugin,  # noqa: F401
    UnidentifiedImageError,
    WebPImagePlugin,  # noqa: F401
    _imaging,
)

from trainer.text import escape_unprintable

DECODE_VERSION = 1
"""Increment it when the decoder accepts other files than before: it invalidates cached validation results."""

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# First bytes of files that no decoder accepts: damaged images, and other files with the extension of an image.
_SIGNATURES = {
    b"\xff\xd8": "a JPEG file whose header is damaged or cut short",
    b"\x89PNG": "a PNG file whose header is damaged or cut short",
    b"GIF8": "a GIF file whose header is damaged or cut short",
    b"RIFF": "a RIFF file that is not a complete WEBP image",
    b"II*\0": "a TIFF file whose directory is damaged or cut off",
    b"MM\0*": "a TIFF file whose directory is damaged or cut off",
    b"%!PS": "a PostScript file, not an image",
    b"%PDF": "a PDF file, not an image",
    b"PK\x03\x04": "a zip archive, not an image",
    b"<": "an HTML, SVG or XML file, not an image",
    b"8BPS": "a Photoshop file: export it as JPEG or PNG",
}
_TRANSPOSE = {  # EXIF orientation -> operation that makes the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags

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


class UnreadableImage(Exception):
    """The file is not a readable image; the message is the short reason, without the path."""


class UnreachableImage(UnreadableImage):
    """The file could not be opened or read: missing, no permission, an I/O error. The reason may be temporary."""


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """Return the image in a file: mode RGB, upright according to its EXIF orientation.

    Transparent pixels are composited over white. 16-bit gray values are scaled to 8 bits, floating-point values
    from [0, 1]. The first frame of an animation is returned. Color profiles are not applied, as in torchvision.

    Raises:
        UnreadableImage: not a regular file, not an image in one of the formats, or a damaged image.

    """
    with _ignore_warnings, _open_file(path) as file:
        try:
            with Image.open(file, formats=_FORMATS) as stored:
                stored.load()
                return upright_rgb(stored)
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage(_identify(file)) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise UnreadableImage(f"more than {limit:,} pixels: rejected as a decompression bomb") from None
        except MemoryError:
            raise UnreachableImage("not enough memory for its pixels") from None
        except Exception as error:  # noqa: BLE001 (a decoder may raise anything for a damaged file)
            if isinstance(error, OSError) and error.errno:
                raise UnreachableImage(f"cannot be read ({error.strerror})") from None
            raise UnreadableImage(_short_reason(error)) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Convert an opened image as `decode` does.

    Raises:
        UnreadableImage: pixel values that cannot be converted to 8 bits.

    """
    operation = _exif_transpose(image)
    rgb = _to_rgb(image)
    return rgb if operation is None else rgb.transpose(operation)


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
def _open_file(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
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
    except OSError as error:
        raise UnreachableImage(f"cannot be opened ({error.strerror})") from None
    with file:
        yield file


def _exif_transpose(image: Image.Image) -> Image.Transpose | None:
    """Return the operation that makes the image upright; None if there is none or the metadata is damaged.

    Pillow's `exif_transpose` also rewrites the metadata and fails if it is damaged.
    """
    try:
        return _TRANSPOSE.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (as above)
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale gray values to 8 bits and round them; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)  # [height, width]
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    if values.min() < 0 or values.max() > white:
        raise UnreadableImage(
            f"gray values from {values.min()} to {values.max()}, expected 0 to {white} (at most 16 bits)"
        )
    gray = (values.astype(np.uint32) * 255 + white // 2) // white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        gray = 255 - gray
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[values == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # [height, width]
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise UnreadableImage("floating-point values that are not finite or not in [0, 1]")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _identify(file: BinaryIO) -> str:
    """Return what a file is that no decoder accepts."""
    file.seek(0)
    head = file.read(512)
    for signature, description in _SIGNATURES.items():
        if head.lstrip().startswith(signature):
            return description
    if head[4:8] == b"ftyp":
        return "an HEIC, AVIF or video file, which is not supported: convert it to JPEG or PNG"
    if _is_text(head):
        return "a text file, not an image"
    return f"not an image in a supported format ({', '.join(_FORMATS)}), or its header is damaged"


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be incomplete
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\ufeff" for character in text)


def _short_reason(error: Exception) -> str:
    text = escape_unprintable(str(error).strip())[:120] or type(error).__name__
    return "damaged: its pixels cannot be decoded" if text.startswith("decoder error") else f"damaged: {text}"
