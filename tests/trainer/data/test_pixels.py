from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.folders import noise_image
from tests.trainer.data.image_files import write_png, write_tiff
from trainer.data.decode import DecodedImage, decode_file, open_image_file
from trainer.data.pixels import is_one_color
from trainer.data.sample_format import UnreadableImage

MAX_SAMPLE_VALUE, SMIN, SMAX = 281, 340, 341  # TIFF tags
Write = Callable[[Path], Path]


def decoded(path: Path) -> DecodedImage:
    with open_image_file(path) as file:
        return decode_file(file, path)


def pixels(path: Path) -> np.ndarray:
    return decoded(path).pixels


def ramp(white: float, dtype: type = np.uint16) -> np.ndarray:
    return np.linspace(0, white, 64).astype(dtype).reshape(4, 16)


def expected(values: np.ndarray, white: float) -> np.ndarray:
    """Return the 8-bit colors of values whose white is given."""
    scaled = np.floor(values.astype(np.float64) * 255 / white + 0.5).astype(np.uint8)
    return scaled if values.ndim == 3 else np.repeat(scaled[..., None], 3, axis=2)


def save(path: Path, values: np.ndarray, **options: object) -> Path:
    Image.fromarray(values).save(path, **options)  # type: ignore[arg-type]
    return path


def write_pgm(path: Path, values: np.ndarray, maxval: int) -> Path:
    path.write_bytes(b"P5 16 4 %d\n" % maxval + values.astype(">u2").tobytes())
    return path


@pytest.mark.parametrize("white", [255, 1023, 4095, 16383, 65535])
@pytest.mark.parametrize(
    "write",
    [
        lambda path, values: write_png(path / "x.png", values),
        lambda path, values: write_tiff(path / "x.tif", values),
        lambda path, values: write_tiff(path / "x.tif", values, order=">", deflate=True),
        lambda path, values: write_tiff(path / "x.tif", values.astype(np.int32)),
        lambda path, values: write_tiff(path / "x.tif", np.dstack([values] * 3)),
        lambda path, values: write_tiff(path / "x.tif", np.dstack([values] * 3), order=">", deflate=True),
        lambda path, values: write_png(path / "x.png", np.dstack([values] * 3)),
        lambda path, values: write_png(path / "x.png", np.dstack([values] * 3 + [np.full_like(values, 65535)])),
        lambda path, values: write_png(path / "x.png", np.dstack([values, np.full_like(values, values.max())])),
        lambda path, values: save(path / "x.tif", values.astype(np.int32), compression="tiff_lzw"),
    ],
    ids=["png", "tiff", "deflated tiff", "int32", "rgb tiff", "deflated rgb", "rgb png", "rgba png", "la png", "lzw"],
)  # fmt: skip
def test_values_span_the_bits_that_they_use(
    write: Callable[[Path, np.ndarray], Path], white: int, tmp_path: Path
) -> None:
    values = ramp(white)
    image, conversions = decoded(write(tmp_path, values))
    largest_difference = np.abs(np.asarray(image).astype(int) - expected(values, white)).max()
    is_upper_byte = white == 65535 and not conversions  # of 16-bit colors, which Pillow does not round
    assert largest_difference <= is_upper_byte
    if not is_upper_byte:
        (conversion,) = conversions
        assert conversion.endswith(f" values scaled from 0..{white}, judged by the largest value of each image")


DARK = ramp(900)
REPEATED = DARK << 4 | DARK >> 8  # 12 bits, scaled up to 16


@pytest.mark.parametrize(
    ("write", "values", "white"),
    [
        (lambda path: write_png(path, DARK, chunks={b"sBIT": b"\x0c"}), DARK, 4095),
        (lambda path: write_png(path, REPEATED, chunks={b"sBIT": b"\x0c"}), REPEATED, 65535),
        (lambda path: write_png(path, DARK // 4 << 4, chunks={b"sBIT": b"\x0c"}), DARK // 4 << 4, 65535),
        (lambda path: write_png(path, DARK, chunks={b"sBIT": b"\x10"}), DARK, 65535),
        (lambda path: write_png(path, np.dstack([DARK] * 3), chunks={b"sBIT": b"\x0b\x0c\x0c"}), DARK, 4095),
        (lambda path: write_tiff(path, DARK, tags={MAX_SAMPLE_VALUE: 4095}), DARK, 4095),
        (lambda path: write_tiff(path, DARK, tags={MAX_SAMPLE_VALUE: 2000}), DARK, 2047),
        (lambda path: write_tiff(path, DARK, tags={MAX_SAMPLE_VALUE: 65535}), DARK, 65535),
        (lambda path: write_tiff(path, DARK, tags={SMAX: 4095}), DARK, 4095),
        (lambda path: write_tiff(path, b"\0\x0f\xff", (2, 1), bits=12), np.array([[0, 4095]]), 4095),
        (lambda path: write_pgm(path, DARK, 4095), DARK, 4095),
        (lambda path: write_pgm(path, DARK, 65535), DARK, 65535),
    ],
)  # fmt: skip
def test_the_range_that_a_file_declares_is_used(write: Write, values: np.ndarray, white: int, tmp_path: Path) -> None:
    image, conversions = decoded(write(tmp_path / "x"))
    assert np.array_equal(image, expected(values, white))
    assert "judged" not in str(conversions)


def test_a_black_image_is_black_and_white_may_be_zero(tmp_path: Path) -> None:
    for values in (np.zeros((4, 16), np.uint16), np.zeros((4, 16, 3), np.uint16)):
        for write in (write_png, write_tiff):
            assert not pixels(write(tmp_path / "x", values)).any()
    inverted = write_tiff(tmp_path / "x", ramp(4095), tags={262: 0})
    assert np.array_equal(pixels(inverted), 255 - expected(ramp(4095), 4095))


@pytest.mark.parametrize(
    ("values", "tags", "white"),
    [
        (ramp(1, np.float32), {}, 1),
        (ramp(0.5, np.float32), {SMAX: 0.5}, 1),
        (ramp(255, np.float32), {}, 255),
        (ramp(200.5, np.float32), {}, 255),
        (np.rint(ramp(3000, np.float32)), {}, 4095),
        (ramp(300.5, np.float32), {SMAX: 400.0}, 400),
    ],
)
def test_floats_are_scaled_from_their_range(
    values: np.ndarray, tags: dict[int, float], white: float, tmp_path: Path
) -> None:
    found = pixels(write_tiff(tmp_path / "x.tif", values, tags=tags)).astype(int)
    assert np.abs(found - expected(values, white)).max() <= 1
    assert found[-1, -1, 0] == np.rint(values.max() * 255 / white)


def test_negative_values_need_a_declared_range(tmp_path: Path) -> None:
    for dtype in (np.int16, np.float32):
        values = np.linspace(-1000, 3000, 64).astype(dtype).reshape(4, 16)
        path = write_tiff(tmp_path / "x.tif", values, tags={SMIN: -1000.0, SMAX: 3000.0})
        assert np.array_equal(pixels(path)[..., 0], np.rint((values + 1000.0) * 255 / 4000))
        with pytest.raises(UnreadableImage, match=r"gray values from -1000 to 3000, expected .*range"):
            decoded(write_tiff(tmp_path / "x.tif", values))


def test_values_without_a_range_are_refused(tmp_path: Path) -> None:
    values = ramp(1, np.float32)
    for wrong, reason in ((np.nan, "finite"), (np.inf, "finite"), (-0.01, "from -0.01 to"), (300.5, "to 300.5")):
        changed = np.where(values == 1, np.float32(wrong), values)
        with pytest.raises(UnreadableImage, match=reason):
            decoded(write_tiff(tmp_path / "x.tif", changed))
    for largest, dtype in ((65536, np.int32), (2**32 - 1, np.uint32)):
        with pytest.raises(
            UnreadableImage, match=f"gray values from 0 to {largest:g}, expected 0 to 65535".replace("+", ".")
        ):
            decoded(write_tiff(tmp_path / "x.tif", np.array([[0, largest]], dtype=dtype)))


def test_colors_that_pillow_reads_wrongly_are_refused(tmp_path: Path) -> None:
    dark = ramp(4095)
    for values, tag, reason in (
        (np.dstack([ramp(65535)] * 3), {284: 2}, "uncompressed planes of 16 bits, which is not supported"),
        (np.dstack([dark] * 4), {338: 1}, "16-bit colors that use 14 bits or fewer, .* not supported"),
        (ramp(255).astype(np.int8), {}, "gray values from -127 to 125"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            decoded(write_tiff(tmp_path / "x.tif", values, tags=tag))
    assert np.array_equal(pixels(write_tiff(tmp_path / "x.tif", ramp(127, np.int8)))[..., 0], ramp(127))


# Transparency


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_a_transparent_gray_becomes_white(bits: int, tmp_path: Path) -> None:
    white = 2**bits - 1
    values = np.array([[0, white // 3, white]])
    transparent = white // 3
    path = write_png(tmp_path / "x.png", values, bits=bits, chunks={b"tRNS": transparent.to_bytes(2, "big")})
    assert decoded(path).conversions[-1] == "transparent pixels, composited over white"
    assert pixels(path)[0, :, 0].tolist() == [0 if transparent else 255, 255, 255]


def test_a_transparent_16_bit_color_is_compared_with_all_bits(tmp_path: Path) -> None:
    colors = np.array([[[5000, 6000, 7000], [5001, 6000, 7000], [60000, 6000, 7000]]])
    transparent = colors[0, 0].astype(">u2").tobytes()
    found = pixels(write_png(tmp_path / "x.png", colors, chunks={b"tRNS": transparent}))
    assert found.tolist() == [[[255] * 3, *(colors[0, 1:] >> 8).tolist()]]


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_alpha_that_is_0_everywhere_is_ignored(mode: str, tmp_path: Path) -> None:
    image = noise_image(1).convert("L" if mode == "LA" else "RGB")
    if mode == "P":
        image = image.quantize(8)
        image.save(tmp_path / "x.png", transparency=bytes(8))
    else:
        image.putalpha(0)
        image.save(tmp_path / "x.png")
    found = decoded(tmp_path / "x.png")
    assert np.array_equal(found.pixels, image.convert("RGB"))
    assert found.conversions == ("an alpha channel of 0 everywhere, which is ignored",)
    image.convert("RGBA").point(lambda value: 0).save(tmp_path / "x.png")
    assert (pixels(tmp_path / "x.png") == 255).all(), "without colors, there is nothing but a white background"


def test_lab_colors_become_srgb(tmp_path: Path) -> None:
    lab = Image.new("LAB", (2, 1))
    lab.putdata([(255, 128, 128), (136, 208, 195)])  # white, and L* 53.2, a* 80, b* 67: red
    lab.save(tmp_path / "x.tif")
    assert np.abs(pixels(tmp_path / "x.tif").astype(int) - [[[255, 255, 255], [255, 0, 0]]]).max() <= 11


def test_an_image_of_one_color_is_recognized() -> None:
    pixels = np.full((3, 3, 3), (1, 2, 3), np.uint8)
    assert is_one_color(pixels)
    for row in (0, 2):
        other = pixels.copy()
        other[row, 2] = (1, 2, 4)
        assert not is_one_color(other)
