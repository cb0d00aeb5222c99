import io
import logging
import os
import random
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
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


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)  # type: ignore[arg-type]
    return path


def png16(path: Path, values: np.ndarray, *chunks: tuple[bytes, bytes]) -> Path:
    """Write a 16-bit gray PNG without Pillow, which may read another format than it writes."""

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


RGB, PALETTE, RAMP = noise_image(2), noise_image(4).quantize(16), np.arange(256, dtype=np.uint8).reshape(16, 16)
CHECKS = np.indices((16, 16)).sum(0) % 2 == 0


@pytest.mark.parametrize(
    ("name", "image", "options"),
    [
        ("x.png", RGB, {}),
        ("x.bmp", RGB, {}),
        ("x.ppm", RGB, {}),
        ("x.tiff", RGB, {"compression": "tiff_lzw"}),
        ("x.TIFF", RGB, {"compression": "tiff_deflate", "format": "TIFF"}),
        ("x.webp", RGB, {"lossless": True}),
        ("png renamed.jpg", RGB, {"format": "PNG"}),
        (os.fsdecode(b"caf\xe9 \xe7\x8c\xab.png"), RGB, {}),
        ("gray.png", RAMP, {}),
        ("gray.pgm", RAMP, {}),
        ("bilevel.png", CHECKS, {}),
        ("bilevel.tif", CHECKS, {"compression": "group4"}),
        ("palette.png", PALETTE, {}),
        ("palette.gif", PALETTE, {}),
    ],
)
def test_lossless_formats_keep_every_pixel(
    tmp_path: Path, name: str, image: np.ndarray | Image.Image, options: dict[str, object]
) -> None:
    expected = image.convert("RGB") if isinstance(image, Image.Image) else as_rgb(image * (255 // image.max()))
    assert np.array_equal(decode_array(save(tmp_path / name, image, **options)), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparent_pixels_are_composited_over_white(tmp_path: Path, mode: str) -> None:
    image = noise_image(5, size=(3, 8)).convert(mode[:-1])
    color = np.asarray(image.convert("RGB")).astype(int)
    image.putalpha(Image.fromarray(np.array([[0, 128, 255]] * 8, dtype=np.uint8)))
    found = decode_array(save(tmp_path / "x.png", image)).astype(int)
    assert (found[:, 0] == 255).all()
    assert np.abs(found[:, 1] - (color[:, 1] * 128 + 255 * 127) / 255).max() <= 1
    assert np.array_equal(found[:, 2], color[:, 2])


def test_transparent_palette_entries_and_colors_become_white(tmp_path: Path) -> None:
    palette = Image.fromarray(np.array([[0, 1, 2]], dtype=np.uint8), "P")
    palette.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    color, gray = np.array([[[1, 2, 3], [1, 2, 4]]], dtype=np.uint8), np.array([[7, 8]], dtype=np.uint8)
    white, red, green, blue = [255] * 3, [255, 0, 0], [0, 255, 0], [0, 0, 255]
    for name, image, transparency, expected in (
        ("one.png", palette, 0, [white, green, blue]),
        ("one.gif", palette, 0, [white, green, blue]),
        ("some.png", palette, bytes([255, 0, 128]), [red, white, [127, 127, 255]]),
        ("color.png", color, (1, 2, 3), [white, [1, 2, 4]]),
        ("gray.png", gray, 7, [white, [8] * 3]),
    ):
        assert decode_array(save(tmp_path / name, image, transparency=transparency)).tolist() == [expected], name


def test_cmyk_is_not_inverted(tmp_path: Path) -> None:
    colors = np.repeat(np.array([[[200, 30, 30], [30, 200, 30], [240, 240, 240]]], dtype=np.uint8), 16, 1).repeat(16, 0)
    for name in ("x.jpg", "x.tif"):
        path = save(tmp_path / name, Image.fromarray(colors).convert("CMYK"), quality=100)
        assert np.abs(decode_array(path).astype(int) - colors).max() <= 3
    assert b"Adobe" in (tmp_path / "x.jpg").read_bytes()[:200]


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
    packed = b"\x00\x0f\xff" + b"\x80\x00\x10"  # 12 bits: 0x000, 0xfff and 0x800, 0x010
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


@pytest.mark.parametrize(
    ("name", "options"), [("x.jpg", {"quality": 95}), ("x.png", {}), ("x.webp", {"lossless": True}), ("x.tif", {})]
)
def test_every_exif_orientation_is_made_upright(tmp_path: Path, name: str, options: dict[str, object]) -> None:
    quarters = np.array([[[250, 0, 0], [0, 250, 0]], [[0, 0, 250], [9, 9, 9]]], dtype=np.uint8)
    stored = quarters.repeat(8, 0).repeat(16, 1)
    turned = stored.transpose(1, 0, 2)
    # Where the stored row 0 and column 0 belong, from the EXIF standard (JEITA CP-3451, "Orientation").
    upright = (stored, stored[:, ::-1], stored[::-1, ::-1], stored[::-1])
    upright += (turned, turned[:, ::-1], turned[::-1, ::-1], turned[::-1])
    for orientation, expected in enumerate(upright, start=1):
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        found = decode_array(save(tmp_path / name, stored, exif=exif, **options))
        assert found.shape == expected.shape
        assert np.abs(found.astype(int) - expected)[2::4, 2::4].max() <= 6
        assert np.array_equal(found, ImageOps.exif_transpose(Image.open(tmp_path / name)).convert("RGB"))


def test_damaged_metadata_is_ignored(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = decode_array(save(tmp_path / "x.jpg", RGB))
    for exif in (b"", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\xff\xff"):
        assert np.array_equal(decode_array(save(tmp_path / "x.jpg", RGB, exif=b"Exif\0\0" + exif)), expected)
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_first_frame_of_an_animation_is_decoded(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    for name, kind in (("x.gif", "GIF"), ("x.png", "PNG"), ("x.tif", "TIFF"), ("x.webp", "WEBP"), ("x.jpg", "MPO")):
        frames[0].save(tmp_path / name, format=kind, save_all=True, append_images=frames[1:])
        assert np.abs(decode_array(tmp_path / name).astype(int) - (255, 0, 0)).max() <= 2


# Files that are refused


def encoded(format_: str, **options: object) -> bytes:
    file = io.BytesIO()
    noise_image(9, size=(80, 60)).save(file, format_, **options)  # type: ignore[arg-type]
    return file.getvalue()


@pytest.mark.parametrize("format_", ["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM"])
def test_truncated_files_are_refused(tmp_path: Path, format_: str, capfd: pytest.CaptureFixture[str]) -> None:
    whole, path = encoded(format_), tmp_path / "x.jpg"
    for share in (0.003, 0.1, 0.5, 0.9, 0.99):
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
        (b"PK\x03\x04\x14\0\0\0", "a zip archive"),
        (b"\0\0\0\x18ftypheic\0\0\0\0", "HEIC"),
        (b"\0" * 4096, "not an image in a supported format"),
        (b"\xff\xd8\xff\xe0", "JPEG|damaged"),
        (encoded("TIFF", compression="tiff_lzw")[:-20], "a TIFF file whose directory is damaged or cut off"),
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
    for function in ("subprocess.Popen", "os.posix_spawn"):
        monkeypatch.setattr(function, lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UnreadableImage, match="PostScript"):
        decode(save(tmp_path / "x.jpg", noise_image(1), format="EPS"))


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
    path, user = save(tmp_path / "x.png", noise_image(1)), os.geteuid()
    path.chmod(0)
    if user == 0:
        with suppress(PermissionError):  # a root user without this right cannot read all files either
            os.seteuid(65534)
    try:
        with pytest.raises(UnreachableImage, match=r"cannot be opened \(Permission denied\)"):
            decode(str(path))
    finally:
        os.seteuid(user)


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
    rng = random.Random(5)
    kinds = [encoded(f) for f in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "PPM")]
    kinds += [encoded("TIFF", compression=c) for c in ("raw", "tiff_lzw", "tiff_deflate", "jpeg", "packbits")]
    opened, reasons = os.listdir("/proc/self/fd"), []  # noqa: PTH208
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
    assert len(os.listdir("/proc/self/fd")) == len(opened)  # noqa: PTH208
    assert not recwarn.list
    assert capfd.readouterr() == ("", "")


def test_pillow_does_not_log_to_the_console(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logging.getLogger(), "handlers", [])  # as in a program that has not configured logging
    logging.getLogger("PIL.TiffImagePlugin").error("More samples per pixel than can be decoded: %s", 91)
    assert capfd.readouterr() == ("", "")
