"""From a file to an upright RGB picture; what cannot be one is an `UnreadableImage` with its reason.

Only regular files in the formats below are opened, whatever their names say: Pillow knows others, one of
which (EPS) starts another program.
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

# The plugins are imported for what they register: no other decoder than these, and before threads meet.
# The JPEG one also opens MPO files, of several pictures.
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
"""To be raised when a file may be judged otherwise than before: earlier verdicts then no longer count."""

_FORMATS = ("JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM")
# How files begin that no decoder takes: damaged ones, and what people keep under a picture's name.
_BEGINNINGS = {
    b"\xff\xd8": "a JPEG file whose header is damaged or cut short",
    b"\x89PNG": "a PNG file whose header is damaged or cut short",
    b"GIF8": "a GIF file whose header is damaged or cut short",
    b"RIFF": "a RIFF file that is no whole WEBP picture",
    b"II*\0": "a TIFF file whose directory is damaged or cut off",
    b"MM\0*": "a TIFF file whose directory is damaged or cut off",
    b"%!PS": "a PostScript file, not a picture",
    b"%PDF": "a PDF file, not a picture",
    b"PK\x03\x04": "a zip archive, not a picture",
    b"<": "an HTML, SVG or XML text, not a picture",
    b"8BPS": "a Photoshop file: export it as JPEG or PNG",
}
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_BITS_PER_SAMPLE, _PHOTOMETRIC, _WHITE_IS_ZERO = 258, 262, 0  # TIFF tags

logging.getLogger("PIL").addHandler(logging.NullHandler())  # else errors are printed where no log is kept


def _silence_libtiff() -> None:
    """Keep libtiff, which Pillow reads TIFF files with, from printing on the console."""
    try:
        set_handler = ctypes.CDLL(_imaging.__file__).TIFFSetErrorHandler
    except (OSError, AttributeError):  # a Pillow that has libtiff linked in, or has none
        return
    set_handler.argtypes, set_handler.restype = [ctypes.c_void_p], ctypes.c_void_p
    set_handler(None)


_silence_libtiff()


class UnreadableImage(Exception):
    """A file that is no picture; its text is the reason, short and without the path."""


class UnreachableImage(UnreadableImage):
    """A file that could not be opened or read to its end: gone, forbidden, a failing disk; not for ever."""


def decode(path: str | os.PathLike[str]) -> Image.Image:
    """Return the picture in a file: mode RGB, upright as its EXIF says.

    What is transparent is laid over white; opaque pixels are as they were. 16-bit grey values are scaled to
    8 bits, floating-point ones from [0, 1]. Of an animation it is the first frame. Colour profiles are not
    applied, as torchvision does not.

    Raises:
        UnreadableImage: not a regular file, not a picture in one of the formats, or a damaged one.

    """
    with _silence, _opened(path) as file:
        try:
            with Image.open(file, formats=_FORMATS) as stored:
                stored.load()
                return upright_rgb(stored)
        except UnreadableImage:
            raise
        except UnidentifiedImageError:
            raise UnreadableImage(_what_else(file)) from None
        except Image.DecompressionBombError:
            limit = 2 * (Image.MAX_IMAGE_PIXELS or 0)
            raise UnreadableImage(f"more than {limit:,} pixels: refused, as a decompression bomb") from None
        except MemoryError:
            raise UnreachableImage("not enough memory for its pixels") from None
        except Exception as error:  # noqa: BLE001 (a decoder raises whatever its parser stumbles over)
            if isinstance(error, OSError) and error.errno:
                raise UnreachableImage(f"cannot be read ({error.strerror})") from None
            raise UnreadableImage(_short(error)) from None


def upright_rgb(image: Image.Image) -> Image.Image:
    """Return an opened picture as `decode` does.

    Raises:
        UnreadableImage: pixel values that cannot be brought to 8 bits.

    """
    turn = _turn(image)
    rgb = _to_rgb(image)
    return rgb if turn is None else rgb.transpose(turn)


class _Silence:
    """Ignores warnings: what Pillow warns of (a large picture, odd metadata) is read or refused here.

    Python keeps one list of filters for all threads: the first to come changes it, the last to go puts it
    back.
    """

    def __init__(self) -> None:
        self._lock, self._inside = threading.Lock(), 0
        self._filters = warnings.catch_warnings()

    def __enter__(self) -> None:
        with self._lock:
            if not self._inside:
                self._filters = warnings.catch_warnings()
                self._filters.__enter__()
                warnings.simplefilter("ignore")
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if not self._inside:
                self._filters.__exit__(None, None, None)


_silence = _Silence()


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a regular file that is not empty."""
    try:
        status = os.stat(path)  # noqa: PTH116
        if stat.S_ISDIR(status.st_mode):
            raise UnreadableImage("a folder, not a file")
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableImage("not a regular file")
        if status.st_size == 0:
            raise UnreadableImage("an empty file (0 bytes)")
        # Should a pipe take its place just now, opening it must not wait for a writer.
        file = open(os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC), "rb")  # noqa: PTH123, SIM115
    except FileNotFoundError:
        what = "a link to nothing" if os.path.islink(path) else "no such file"  # noqa: PTH114
        raise UnreachableImage(what) from None
    except OSError as error:
        raise UnreachableImage(f"cannot be opened ({error.strerror})") from None
    with file:
        yield file


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Return what sets the picture upright; damaged metadata says nothing of its pixels.

    Pillow's `exif_transpose` also writes the metadata anew, and fails where it is damaged.
    """
    try:
        return _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # noqa: BLE001 (as above)
        return None


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        return _from_16_bits(image)
    if image.mode == "F":
        return _from_floats(image)
    if image.has_transparency_data:
        coloured = image.convert("RGBA")
        white = Image.new("RGBA", coloured.size, "white")
        return Image.alpha_composite(white, coloured).convert("RGB")
    return image.convert("RGB")


def _from_16_bits(image: Image.Image) -> Image.Image:
    """Scale grey values to 8 bits, rounded; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)  # [height, width]
    tags = getattr(image, "tag_v2", {})
    white = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else 65535
    if values.min() < 0 or values.max() > white:
        raise UnreadableImage(
            f"grey values from {values.min()} to {values.max()}: expected 0 to {white}, of at most 16 bits"
        )
    grey = (values.astype(np.uint32) * 255 + white // 2) // white
    if tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        grey = 255 - grey
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey[values == transparent] = 255
    return Image.fromarray(grey.astype(np.uint8)).convert("RGB")


def _from_floats(image: Image.Image) -> Image.Image:
    values = np.asarray(image)  # [height, width]
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise UnreadableImage("floating-point values that are not finite, or not in [0, 1]")
    return Image.fromarray(np.rint(values * 255).astype(np.uint8)).convert("RGB")


def _what_else(file: BinaryIO) -> str:
    """Return why a file that no decoder takes is not a picture."""
    file.seek(0)
    begin = file.read(512)
    for magic, what in _BEGINNINGS.items():
        if begin.lstrip().startswith(magic):
            return what
    if begin[4:8] == b"ftyp":
        return "an HEIC, AVIF or video file, which is not read: convert it to JPEG or PNG"
    if _is_text(begin):
        return "a text, not a picture"
    return f"not a picture in a format that is read ({', '.join(_FORMATS)}), or its beginning is damaged"


def _is_text(begin: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(begin)  # the last character may be cut
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\ufeff" for character in text)


def _short(error: Exception) -> str:
    text = escape_unprintable(str(error).strip())[:120] or type(error).__name__
    return "damaged: its pixels cannot be decoded" if text.startswith("decoder error") else f"damaged: {text}"
