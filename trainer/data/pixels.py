"""Convert the pixels of an opened image to 8-bit RGB.

A file may store samples of more than 8 bits without saying which value is white. The range that it declares decides,
see `sample_format`; without one, the largest sample of the image. The result depends on the file alone.
"""

import sys
from typing import Any, BinaryIO, NamedTuple

import numpy as np
from PIL import Image, ImageCms

from trainer.data.sample_format import SampleFormat, UnreadableImage

_BIT_DEPTHS = (8, 10, 12, 14, 16)  # of cameras and scanners
_CONVERT = "convert it to JPEG or PNG"
_NO_ALPHA = "an alpha channel of 0 everywhere, which is ignored"
_OVER_WHITE = "transparent pixels, composited over white"
_GUESSED = ", judged by the largest value of each image"


class RgbImage(NamedTuple):
    """An image of mode RGB."""

    image: Image.Image
    conversions: tuple[str, ...]
    """What was done to its pixels, where the file left a choice."""


def to_rgb(image: Image.Image, samples: SampleFormat, file: BinaryIO | None = None) -> RgbImage:
    """Convert a loaded image; transparent pixels are composited over white.

    Args:
        image: an image of any mode.
        samples: how its file stores the samples.
        file: its file, which is read again for the low bytes of 16-bit colors if they are needed.

    Raises:
        UnreadableImage: pixel values whose range is unknown.

    """
    if image.mode.startswith("I") or image.mode == "F" or (image.mode == "L" and samples.is_signed):
        return _from_gray_values(image, samples)
    if image.mode == "LAB":
        return RgbImage(_from_lab(image), ())
    conversions: tuple[str, ...] = ()
    transparent = image.info.get("transparency")
    if samples.raw_mode in ("L;2", "L;4") and isinstance(transparent, int):
        # Pillow scales the samples to 8 bits, but not the transparent value.
        image.info["transparency"] = transparent * {"L;2": 85, "L;4": 17}[samples.raw_mode]
    elif ";16" in samples.raw_mode and image.mode in ("RGB", "RGBA") and file is not None:
        image, conversions = _from_16_bit_colors(image, samples, file)
    if not image.has_transparency_data:
        return RgbImage(image.convert("RGB"), conversions)
    rgba = image.convert("RGBA")
    least, greatest = rgba.getchannel("A").getextrema()
    if greatest == 0 and not is_one_color(np.asarray(opaque := rgba.convert("RGB"))):
        return RgbImage(opaque, (*conversions, _NO_ALPHA))
    if least != 255:
        conversions = (*conversions, _OVER_WHITE)
    white = Image.new("RGBA", rgba.size, "white")
    return RgbImage(Image.alpha_composite(white, rgba).convert("RGB"), conversions)


def is_one_color(pixels: np.ndarray) -> bool:
    """Return whether all pixels of an image, uint8 [H, W, 3], are equal."""
    first = pixels[0, 0]
    return bool((pixels[0] == first).all() and (pixels == first).all())  # the first row tells it of most images


def _from_gray_values(image: Image.Image, samples: SampleFormat) -> RgbImage:
    """Scale gray values to 8 bits and round them; Pillow's own conversion clips them at 255."""
    values = np.asarray(image)  # [height, width]
    if image.mode == "L":
        values = values.view(np.int8)
    elif samples.raw_mode == "I;32N":
        values = values.view(np.uint32)
    if not np.isfinite(values).all():
        raise UnreadableImage("gray values that are not finite")
    low, high = values.min(), values.max()
    is_float = values.dtype == np.float32
    if is_float and low >= 0 and high <= 1:
        gray, conversion = np.rint(values * 255), "scaled from 0..1"
    elif is_float and low >= 0 and high <= 255:
        gray, conversion = np.rint(values), "rounded"
    elif low >= 0 and high <= 65535 and not (is_float and (values != np.rint(values)).any()):
        gray, conversion = _to_8_bits(values.astype(np.uint32), samples)
    elif samples.limits is not None and samples.limits[0] <= low and high <= samples.limits[1]:
        black, white = samples.limits
        gray = np.rint((values.astype(np.float64) - black) * (255 / (white - black)))
        conversion = f"scaled from {black:g}..{white:g}"
    else:
        expected = "0 to 1 or 0 to 255" if is_float else "0 to 65535"
        raise UnreadableImage(
            f"gray values from {low:g} to {high:g}, expected {expected}, or a declared range (SMinSampleValue and "
            "SMaxSampleValue of a TIFF)"
        )
    if samples.white_is_zero:
        gray = 255 - gray
    conversions: tuple[str, ...] = (f"gray values {conversion}",)
    is_transparent = values == image.info.get("transparency")
    if np.any(is_transparent):
        gray[is_transparent] = 255
        conversions = (*conversions, _OVER_WHITE)
    return RgbImage(Image.fromarray(gray.astype(np.uint8)).convert("RGB"), conversions)


def _to_8_bits(values: np.ndarray, samples: SampleFormat) -> tuple[np.ndarray, str]:
    """Scale uint32 values of at most 16 bits to 0..255; return also what was done."""
    bits, largest, guessed = samples.bits or 0, int(values.max()), ""
    if samples.is_scaled and 0 < bits < 16 and not _is_unscaled(values, bits):
        bits = 16
    elif not bits or largest >> bits:
        bits, guessed = next(depth for depth in _BIT_DEPTHS if not largest >> depth), _GUESSED
    white = (1 << bits) - 1
    return (values * 255 + white // 2) // white, f"scaled from 0..{white}{guessed}"


def _is_unscaled(values: np.ndarray, bits: int) -> bool:
    """Return whether 16-bit values were not scaled up from `bits` bits, by a shift or by repeating the upper bits."""
    upper = values >> (16 - bits)
    shifted = upper << (16 - bits)
    repeated = shifted | (upper >> max(0, 2 * bits - 16))
    return not (values.max() >> bits or (values == shifted).all() or (values == repeated).all())


def _from_16_bit_colors(
    image: Image.Image, samples: SampleFormat, file: BinaryIO
) -> tuple[Image.Image, tuple[str, ...]]:
    """Return the 8-bit image of 16-bit colors, of which Pillow keeps the upper bytes.

    The lower bytes are needed if the values use 14 bits or fewer, and to find a transparent color.
    """
    is_gray = samples.raw_mode.startswith("LA")
    upper = np.asarray(image).astype(np.uint32)  # [height, width, 3 or 4]
    is_dark = upper[..., :3].max() < 1 << 6 and samples.bits != 16
    transparent = image.info.get("transparency")
    if samples.raw_mode.startswith("RGBa") and 0 < upper[..., 3].max() < 1 << 6:
        is_dark = True  # its colors are divided by alpha already
    if not is_dark and transparent is None:
        return image, ()
    if samples.has_planes or samples.raw_mode.startswith("RGBa"):
        raise UnreadableImage(
            f"16-bit colors that use 14 bits or fewer, in a kind of TIFF that is not supported: {_CONVERT}"
        )
    lower = _load_lower_bytes(file, samples.raw_mode)
    if is_gray:  # stored as gray, gray, alpha, alpha: upper and lower byte of each
        lower = lower[..., [1, 1, 1, 3]]
    values = upper << 8 | lower
    rgb, conversion = _to_8_bits(values[..., :3], samples) if is_dark else (upper[..., :3], "")
    channels = [rgb]
    if transparent is not None:
        channels.append(np.where((values[..., :3] == transparent).all(axis=-1), 0, 255)[..., None])
    elif image.mode == "RGBA":
        channels.append(_to_8_bits(values[..., 3:], samples)[0])
    converted = Image.fromarray(np.concatenate(channels, axis=-1).astype(np.uint8))
    return converted, (f"color values {conversion}",) if is_dark else ()


def _load_lower_bytes(file: BinaryIO, raw_mode: str) -> np.ndarray:
    """Return the lower bytes of 16-bit samples: those that Pillow keeps if it reads them in the other byte order."""
    other_order = ";16B" if sys.byteorder == "little" else ";16L"
    swapped = {";16L": ";16B", ";16B": ";16L", ";16N": other_order}[raw_mode[-4:]]
    new_mode = "RGBA" if raw_mode.startswith("LA") else raw_mode[:-4] + swapped
    file.seek(0)
    with Image.open(file, formats=("PNG", "TIFF")) as image:
        image.tile = [tile._replace(args=_with_raw_mode(tile.args, new_mode)) for tile in image.tile]
        return np.asarray(image)


def _with_raw_mode(arguments: Any, raw_mode: str) -> Any:
    return raw_mode if isinstance(arguments, str) else (raw_mode, *arguments[1:])


def _from_lab(image: Image.Image) -> Image.Image:
    """Convert CIELAB as stored in a TIFF (white point D50) to sRGB."""
    profiles = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    converted = ImageCms.applyTransform(image, ImageCms.buildTransform(*profiles, "LAB", "RGB"))
    assert converted is not None  # None is for in-place conversions
    return converted
