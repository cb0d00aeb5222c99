"""How an image file stores its samples, as far as Pillow does not apply it: bits in use, range, byte order.

A PNG declares the bits in use by sBIT; a TIFF by BitsPerSample, MaxSampleValue, SMinSampleValue and SMaxSampleValue.
Of a PGM and a JPEG 2000, Pillow scales the values from the declared range to 16 bits.
"""

from dataclasses import dataclass
from typing import Any, BinaryIO

import numpy as np
from PIL import Image, PngImagePlugin, TiffImagePlugin

_BITS_PER_SAMPLE, _PHOTOMETRIC, _MAX, _PLANAR, _FORMAT, _SMIN, _SMAX = 258, 262, 281, 284, 339, 340, 341  # TIFF tags
_WHITE_IS_ZERO, _SEPARATE_PLANES, _SIGNED = 0, 2, (2,)


class UnreadableImage(Exception):
    """The file is not a readable image; the message is the short reason, without the path."""


@dataclass(frozen=True)
class SampleFormat:
    """How a file stores its samples. The defaults stand for an image that does not come from a file."""

    raw_mode: str = ""
    """Layout of the stored samples by Pillow's name, such as `L;4` or `RGB;16B`."""
    bits: int | None = None
    """Number of bits that the samples use according to the file; None if it does not say."""
    is_scaled: bool = False
    """Whether values of `bits` bits were scaled up to the full range of the samples when the file was written."""
    limits: tuple[float, float] | None = None
    """Values of black and white according to the file; None if it does not say."""
    white_is_zero: bool = False
    """Whether small values are white."""
    is_signed: bool = False
    """Whether the samples are signed integers."""
    has_planes: bool = False
    """Whether the samples of each channel are stored separately."""


def read_sample_format(image: Image.Image, file: BinaryIO) -> SampleFormat:
    """Return the format of an image that was opened from `file`, before its pixels are loaded."""
    raw_mode = _raw_mode(image)
    if isinstance(image, PngImagePlugin.PngImageFile):
        return SampleFormat(raw_mode, bits=_png_significant_bits(file), is_scaled=True)
    if isinstance(image, TiffImagePlugin.TiffImageFile):
        return _tiff_sample_format(image, raw_mode)
    return SampleFormat(raw_mode, bits=16 if image.format in ("PPM", "JPEG2000") else None, is_scaled=True)


def _tiff_sample_format(image: TiffImagePlugin.TiffImageFile, raw_mode: str) -> SampleFormat:
    tags = image.tag_v2
    has_planes = tags.get(_PLANAR) == _SEPARATE_PLANES
    if has_planes and image.mode in ("RGB", "RGBA") and 16 in tags[_BITS_PER_SAMPLE] and image.tile[0][0] == "raw":
        # Pillow reads other pixels than the file holds.
        raise UnreadableImage(
            "a TIFF of uncompressed planes of 16 bits, which is not supported: convert it to JPEG or PNG"
        )
    low, high, largest = (_number(tags.get(tag)) for tag in (_SMIN, _SMAX, _MAX))
    largest = 4095 if tags.get(_BITS_PER_SAMPLE) == (12,) else largest or high or 0
    return SampleFormat(
        raw_mode,
        bits=int(largest).bit_length() if 1 <= largest <= 65535 else None,
        limits=(low or 0.0, high) if high is not None and (low or 0.0) < high else None,
        white_is_zero=tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO,
        is_signed=tags.get(_FORMAT) == _SIGNED,
        has_planes=has_planes,
    )


def _raw_mode(image: Image.Image) -> str:
    tiles = getattr(image, "tile", None)
    arguments = tiles[0][3] if tiles else None
    raw_mode = arguments[0] if isinstance(arguments, tuple) and arguments else arguments
    return raw_mode if isinstance(raw_mode, str) else ""


def _png_significant_bits(file: BinaryIO) -> int | None:
    """Return the largest number in the sBIT chunk of a PNG; None if it has none."""
    position = file.tell()
    try:
        file.seek(8)
        while len(header := file.read(8)) == 8 and (kind := header[4:]) != b"IDAT":
            length = int.from_bytes(header[:4], "big")
            if kind == b"sBIT":
                return max(file.read(min(length, 4)), default=None)
            file.seek(length + 4, 1)  # the content and its checksum
        return None
    finally:
        file.seek(position)


def _number(value: Any) -> float | None:
    """Return the largest number of a TIFF tag; None if the tag is missing or not finite."""
    numbers = [float(each) for each in (value if isinstance(value, tuple) else (value,)) if each is not None]
    return max(numbers) if numbers and np.isfinite(numbers).all() else None
