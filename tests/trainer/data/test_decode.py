import io
import logging
import os
import random
import struct
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.folders import noise_image
from trainer.data.decode import UnreachableImage, UnreadableImage, decode

ORIENTATION = 0x0112


def decode_array(path: Path) -> np.ndarray:
    image = decode(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def save(path: Path, array: np.ndarray, **options: object) -> Path:
    Image.fromarray(array).save(path, **options)  # type: ignore[arg-type]
    return path


def png16(path: Path, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> Path:
    """Write a 16-bit gray PNG without Pillow, which may read another format than it writes."""
    import zlib

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    height, width = values.shape
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", width, height, 16, 0, 0, 0, 0)
    body = [chunk(b"IHDR", header), *(chunk(*c) for c in chunks), chunk(b"IDAT", zlib.compress(rows))]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(body) + chunk(b"IEND", b""))
    return path


def tiff(path: Path, data: bytes, size: tuple[int, int], *, order: str, bits: int = 16, photometric: int = 1) -> Path:
    """Write a gray TIFF of one strip without Pillow, in either byte order."""
    width, height = size
    tags = [(256, width), (257, height), (258, bits), (259, 1), (262, photometric), (273, 8), (277, 1)]
    tags += [(278, height), (279, len(data))]
    directory = struct.pack(f"{order}H", len(tags))
    for tag, value in tags:
        directory += struct.pack(f"{order}HHII", tag, 4, 1, value)
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(f"{order}I", 8 + len(data)) + data + directory + b"\0\0\0\0")
    return path


def tiff16(path: Path, values: np.ndarray, *, order: str, photometric: int = 1) -> Path:
    data = values.astype(f"{order}u2").tobytes()
    return tiff(path, data, values.shape[::-1], order=order, photometric=photometric)


def as_rgb(gray: np.ndarray) -> np.ndarray:
    return np.repeat(gray.astype(np.uint8)[..., None], 3, axis=2)


# Files that are decoded


@pytest.mark.parametrize("size", [(1, 1), (640, 480)])
def test_jpeg_is_decoded_as_by_pillow(tmp_path: Path, size: tuple[int, int]) -> None:
    noise_image(1, size=size).save(tmp_path / "x.jpg", quality=90)
    assert np.array_equal(decode_array(tmp_path / "x.jpg"), Image.open(tmp_path / "x.jpg").convert("RGB"))
    assert np.array_equal(decode(tmp_path / "x.jpg"), Image.open(tmp_path / "x.jpg").convert("RGB"))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("x.png", {}),
        ("x.bmp", {}),
        ("x.ppm", {}),
        ("x.tif", {}),
        ("x.tiff", {"compression": "tiff_lzw"}),
        ("x.TIFF", {"compression": "tiff_deflate", "format": "TIFF"}),
        ("x.webp", {"lossless": True}),
        ("png renamed.jpg", {"format": "PNG"}),
        (os.fsdecode(b"caf\xe9 \xe7\x8c\xab.png"), {}),
    ],
)
def test_lossless_formats_keep_every_pixel(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    original = np.asarray(noise_image(2))
    assert np.array_equal(decode_array(save(tmp_path / name, original, **options)), original)


def test_gray_and_bilevel_images_become_rgb(tmp_path: Path) -> None:
    ramp = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert np.array_equal(decode_array(save(tmp_path / "gray.png", ramp)), as_rgb(ramp))
    assert np.array_equal(decode_array(save(tmp_path / "gray.pgm", ramp)), as_rgb(ramp))
    checks = np.indices((16, 16)).sum(0) % 2 == 0
    Image.fromarray(checks).save(tmp_path / "1.png")
    Image.fromarray(checks).save(tmp_path / "1.tif", compression="group4")
    for name in ("1.png", "1.tif"):
        assert np.array_equal(decode_array(tmp_path / name), as_rgb(255 * checks))


def test_palette_image_becomes_rgb(tmp_path: Path) -> None:
    image = noise_image(4).quantize(16)
    image.save(tmp_path / "x.png")
    image.save(tmp_path / "x.gif")
    for name in ("x.png", "x.gif"):
        assert np.array_equal(decode_array(tmp_path / name), image.convert("RGB"))


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_composited_over_white(tmp_path: Path, mode: str) -> None:
    color = np.asarray(noise_image(5, size=(3, 8)).convert("RGB" if mode == "RGBA" else "L"))
    color = color.reshape(8, 3, -1)
    alpha = np.array([0, 128, 255], dtype=np.uint8)[None, :, None].repeat(8, 0)
    Image.fromarray(np.concatenate([color, alpha], axis=2), mode).save(tmp_path / "x.png")
    found = decode_array(tmp_path / "x.png").astype(int)
    expected = np.broadcast_to(color, (8, 3, 3)).astype(int)
    assert (found[:, 0] == 255).all()
    assert np.abs(found[:, 1] - (expected[:, 1] * 128 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(found[:, 2], expected[:, 2])


def test_transparent_palette_entries_and_colors_become_white(tmp_path: Path) -> None:
    red_green = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    red_green.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    red_green.save(tmp_path / "one.png", transparency=0)
    red_green.save(tmp_path / "some.png", transparency=bytes([255, 0, 128]))
    red_green.save(tmp_path / "one.gif", transparency=0)
    white, green, blue = [255] * 3, [0, 255, 0], [0, 0, 255]
    assert decode_array(tmp_path / "one.png").tolist() == [[white, green, blue]]
    assert decode_array(tmp_path / "one.gif").tolist() == [[white, green, blue]]
    some = decode_array(tmp_path / "some.png").astype(int)
    assert np.abs(some - [[[255, 0, 0], white, [127, 127, 255]]]).max() <= 1
    Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint8)).save(
        tmp_path / "key.png", transparency=(1, 2, 3)
    )
    assert decode_array(tmp_path / "key.png").tolist() == [[white, [1, 2, 4]]]
    Image.fromarray(np.array([[7, 8]], dtype=np.uint8)).save(tmp_path / "gray.png", transparency=7)
    assert decode_array(tmp_path / "gray.png").tolist() == [[white, [8] * 3]]


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    colors = np.zeros((16, 48, 3), dtype=np.uint8)
    colors[:, :16], colors[:, 16:32], colors[:, 32:] = (200, 30, 30), (30, 200, 30), (240, 240, 240)
    cmyk = Image.fromarray(colors).convert("CMYK")
    cmyk.save(tmp_path / "x.jpg", quality=100)
    cmyk.save(tmp_path / "x.tif")
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()[:200]
    assert Image.open(tmp_path / "x.jpg").mode == "CMYK"
    for name in ("x.jpg", "x.tif"):
        assert np.abs(decode_array(tmp_path / name).astype(int) - colors).max() <= 3


VALUES_16 = np.array([[0, 128, 129, 255, 256, 257], [1000, 32767, 32768, 65278, 65407, 65535]])
EXPECTED_8 = as_rgb(np.rint(VALUES_16 / 257))


def test_16_bit_values_are_scaled_not_clipped(tmp_path: Path) -> None:
    files = [
        png16(tmp_path / "x.png", VALUES_16),
        tiff16(tmp_path / "little.tif", VALUES_16, order="<"),
        tiff16(tmp_path / "big.tif", VALUES_16, order=">"),
        save(tmp_path / "pillow.png", VALUES_16.astype(np.uint16)),
        save(tmp_path / "pillow.tif", VALUES_16.astype(np.uint16), compression="tiff_lzw"),
        save(tmp_path / "32 bits.tif", VALUES_16.astype(np.int32)),
        tmp_path / "x.pgm",
    ]
    files[-1].write_bytes(b"P5 6 2 65535\n" + VALUES_16.astype(">u2").tobytes())
    for path in files:
        assert np.array_equal(decode_array(path), EXPECTED_8), path.name


def test_12_bit_values_are_scaled(tmp_path: Path) -> None:
    packed = b"\x00\x0f\xff" + b"\x80\x00\x10"  # 0x000, 0xfff and 0x800, 0x010
    path = tiff(tmp_path / "x.tif", packed, (2, 2), order="<", bits=12)
    assert np.array_equal(decode_array(path), as_rgb(np.array([[0, 255], [128, 1]])))


def test_16_bit_image_with_white_at_zero_or_a_transparent_gray(tmp_path: Path) -> None:
    inverted = tiff16(tmp_path / "x.tif", VALUES_16, order="<", photometric=0)
    assert np.array_equal(decode_array(inverted), 255 - EXPECTED_8)
    keyed = png16(tmp_path / "x.png", VALUES_16, (b"tRNS", struct.pack(">H", 1000)))
    expected = EXPECTED_8.copy()
    expected[1, 0] = 255
    assert np.array_equal(decode_array(keyed), expected)


def test_floats_in_0_to_1_are_decoded_and_others_refused(tmp_path: Path) -> None:
    values = np.array([[0, 0.25, 0.5], [0.75, 1, 1 / 255]], dtype=np.float32)
    assert np.array_equal(decode_array(save(tmp_path / "x.tif", values)), as_rgb(np.rint(values * 255)))
    for wrong in (np.nan, np.inf, -0.01, 1.01, 200):
        with pytest.raises(UnreadableImage, match=r"not finite or not in \[0, 1\]"):
            decode(str(save(tmp_path / "wrong.tif", np.where(values == 0.5, np.float32(wrong), values))))


def test_gray_values_beyond_16_bits_are_refused(tmp_path: Path) -> None:
    for values in ([[0, 65536]], [[-1, 5]]):
        with pytest.raises(UnreadableImage, match="gray values from"):
            decode(str(save(tmp_path / "x.tif", np.array(values, dtype=np.int32))))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("name", ["x.jpg", "x.png", "x.webp", "x.tif"])
def test_every_exif_orientation_is_made_upright(tmp_path: Path, name: str, orientation: int) -> None:
    stored = np.zeros((16, 32, 3), dtype=np.uint8)
    stored[:8, :16], stored[:8, 16:], stored[8:, :16] = (250, 0, 0), (0, 250, 0), (0, 0, 250)
    stored[8:, 16:] = (9, 9, 9)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    options = {"quality": 95} if name == "x.jpg" else {"lossless": True} if name == "x.webp" else {}
    Image.fromarray(stored).save(tmp_path / name, exif=exif, **options)  # type: ignore[arg-type]
    # Where the stored row 0 and column 0 belong, from the EXIF standard (JEITA CP-3451, "Orientation").
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.transpose(1, 0, 2),
        6: stored.transpose(1, 0, 2)[:, ::-1],
        7: stored.transpose(1, 0, 2)[::-1, ::-1],
        8: stored.transpose(1, 0, 2)[::-1],
    }[orientation]
    found = decode_array(tmp_path / name)
    assert found.shape == upright.shape
    assert np.abs(found.astype(int) - upright)[2::4, 2::4].max() <= 6
    assert np.array_equal(found, ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))


@pytest.mark.parametrize(
    "exif", [b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\xff\xff", b"rubbish"]
)
def test_damaged_metadata_is_ignored(
    tmp_path: Path, exif: bytes, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    noise_image(6).save(tmp_path / "x.jpg", exif=exif)
    noise_image(6).save(tmp_path / "y.jpg")
    assert np.array_equal(decode_array(tmp_path / "x.jpg"), decode_array(tmp_path / "y.jpg"))
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_first_frame_of_an_animation_is_decoded(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name, kind in (("x.gif", "GIF"), ("x.png", "PNG"), ("x.tif", "TIFF"), ("x.webp", "WEBP"), ("x.jpg", "MPO")):
        frames[0].save(tmp_path / name, format=kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode_array(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 2


# Files that are refused


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def encoded(format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    noise_image(9, size=(80, 60)).save(file, format_, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
@pytest.mark.parametrize("share", [0.003, 0.1, 0.5, 0.9, 0.99])
def test_truncated_files_are_refused(
    tmp_path: Path, format_: str, share: float, capfd: pytest.CaptureFixture[str]
) -> None:
    whole = encoded(format_)
    path = tmp_path / "x.jpg"
    path.write_bytes(whole[: max(3, int(share * len(whole)))])
    with pytest.raises(UnreadableImage, match=r"damaged|truncated|cut|text|not a complete"):
        decode(str(path))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", r"an empty file \(0 bytes\)"),
        (b"this is not an image\n", "a text file, not an image"),
        ("这不是图片。\n".encode() * 100, "a text file, not an image"),
        (b"\n <!DOCTYPE html><html>404</html>", "an HTML, SVG or XML file"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage\n", "a PostScript file"),
        (b"%PDF-1.7 ", "a PDF file"),
        (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0" * 4096, "not an image in a supported format"),
        (b"\xff\xd8\xff\xe0", "JPEG|damaged"),
        (encoded("TIFF", compression="tiff_lzw")[:-20], "a TIFF file whose directory is damaged or cut off"),
        (encoded("ICO"), "not an image in a supported format"),
        (encoded("PCX"), "not an image in a supported format"),
    ],
)
def test_other_files_with_an_image_extension_are_refused(tmp_path: Path, content: bytes, reason: str) -> None:
    path = tmp_path / "x.jpg"
    path.write_bytes(content)
    with pytest.raises(UnreadableImage, match=reason) as caught:
        decode(str(path))
    assert str(path) not in str(caught.value)
    assert len(str(caught.value)) < 150
    assert not isinstance(caught.value, UnreachableImage)


def test_ghostscript_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(*arguments: object, **options: object) -> None:
        pytest.fail("a program was started")

    monkeypatch.setattr("subprocess.Popen", start)
    monkeypatch.setattr("os.posix_spawn", start)
    for name in ("x.eps", "x.jpg"):
        noise_image(1).save(tmp_path / name, format="EPS")
        with pytest.raises(UnreadableImage, match="PostScript"):
            decode(str(tmp_path / name))


@contextmanager
def without_permission(path: Path) -> Iterator[None]:
    """Remove the permission to read a file, for root too."""
    path.chmod(0)
    user = os.geteuid()
    if user == 0:
        with suppress(PermissionError):  # a root user without this right cannot read all files either
            os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(user)
        path.chmod(0o600)


@pytest.mark.timeout(20)
def test_anything_but_a_regular_file_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "link.jpg").symlink_to(tmp_path / "gone")
    (tmp_path / "self.jpg").symlink_to(tmp_path / "self.jpg")
    (tmp_path / "null.jpg").symlink_to("/dev/zero")
    for name, reason, unreachable in (
        ("pipe.jpg", "not a regular file", False),
        ("folder.jpg", "a folder, not a file", False),
        ("null.jpg", "not a regular file", False),
        ("link.jpg", "a broken symbolic link", True),
        ("self.jpg", "cannot be opened", True),
        ("gone.jpg", "no such file", True),
        ("x" * 300, "cannot be opened", True),
    ):
        with pytest.raises(UnreadableImage, match=reason) as caught:
            decode(str(tmp_path / name))
        assert isinstance(caught.value, UnreachableImage) == unreachable, name


def test_file_without_read_permission_is_unreachable(tmp_path: Path) -> None:
    path = tmp_path / "x.png"
    noise_image(1).save(path)
    with without_permission(path), pytest.raises(UnreachableImage, match=r"cannot be opened \(Permission denied\)"):
        decode(str(path))
    assert decode_array(path).shape == (30, 40, 3)


def test_image_beyond_pillows_limit_is_refused_and_a_large_one_gives_no_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    noise_image(1, size=(40, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    with pytest.raises(UnreadableImage, match="more than 1,198 pixels: rejected"):
        decode(str(tmp_path / "x.png"))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 601)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        filters = warnings.filters[:]
        with ThreadPoolExecutor(4) as threads:
            found = list(threads.map(decode_array, [tmp_path / "x.png"] * 50))
        assert warnings.filters == filters
    assert {array.shape for array in found} == {(30, 40, 3)}
    assert capfd.readouterr() == ("", "")


def test_decompression_bomb_in_a_text_chunk_is_refused(tmp_path: Path) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("bomb", "x" * 80_000_000, zip=True)
    noise_image(1).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UnreadableImage, match=r"damaged: .*[Dd]ecompressed|too large|truncated"):
        decode(str(tmp_path / "x.png"))


def test_corrupted_bytes_are_decoded_or_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], recwarn: pytest.WarningsRecorder
) -> None:
    seed = random.randrange(2**32)
    rng = random.Random(seed)
    kinds = [encoded(f) for f in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM")]
    kinds += [encoded("TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    opened = open_files()
    reasons = []
    for whole in kinds:
        for _ in range(40):
            data = bytearray(whole)
            for _ in range(rng.choice([1, 3, 20])):
                data[rng.randrange(rng.choice([64, len(data)]))] = rng.randrange(256)
            path = tmp_path / "x.jpg"
            path.write_bytes(data)
            try:
                assert decode(str(path)).mode == "RGB"
            except UnreadableImage as error:
                reasons.append(str(error))
    assert len(reasons) > 40
    assert all(0 < len(reason) < 150 and reason.isprintable() for reason in reasons)
    assert open_files() == opened
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")
    print(f"seed {seed}")


# Threads, processes and logging


def test_pillow_does_not_log_to_the_console(capfd: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("PIL.TiffImagePlugin")
    root = logging.getLogger()
    handlers = root.handlers[:]
    root.handlers.clear()  # as in a program that has not configured logging; pytest has
    try:
        logger.error("More samples per pixel than can be decoded: %s", 91)
    finally:
        root.handlers[:] = handlers
    assert capfd.readouterr() == ("", "")
