import io
import logging
import os
import random
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps, PngImagePlugin

from tests.folders import noise_image
from tests.trainer.data.image_files import write_tiff
from trainer.data import image_formats
from trainer.data.decode import UnreachableImage, UnreadableImage, decode

ORIENTATION = 0x0112


def decode_array(path: Path) -> np.ndarray:
    pixels = decode(str(path))
    assert pixels.shape[2:] == (3,)
    return pixels


def save(path: Path, image: np.ndarray | Image.Image, **options: object) -> Path:
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(path, **options)  # type: ignore[arg-type]
    return path


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
        ("x.tga", RGB, {"compression": "tga_rle"}),
        ("x.heic", RGB, {"quality": -1, "chroma": 444, "matrix_coefficients": 0}),
        ("x.jp2", RGB, {}),
        ("jp2 renamed.jfif", RGB, {"format": "JPEG2000"}),
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
    for name, kind in (
        ("x.gif", "GIF"),
        ("x.png", "PNG"),
        ("x.tif", "TIFF"),
        ("x.webp", "WEBP"),
        ("x.jpg", "MPO"),
        ("x.avif", "AVIF"),
    ):
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
        (b"\0\0\0\x18ftypheic\0\0\0\0", "an AVIF or HEIC image that is damaged"),
        (b"\0\0\0\x18ftypisom\0\0\0\0", "a video or another file that is not supported"),
        (b"\xff\x0a\xfa\x7f", "a JPEG XL image, which is not supported"),
        (b"\0" * 4096, "not an image in a supported format"),
        (b"\xff\xd8\xff\xe0", "JPEG|damaged"),
        (encoded("TIFF", compression="tiff_lzw")[:-20], "a TIFF file whose directory is damaged or cut off"),
        (encoded("TGA"), "not an image in a supported format"),
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


@pytest.mark.parametrize(
    ("values", "tags", "kind"),
    [
        (np.zeros((4, 4, 3), np.uint32), {}, "32-bit unsigned samples x 3, compression raw"),
        (np.zeros((4, 4, 3), np.float32), {}, "32-bit floating-point samples x 3"),
        (np.zeros((4, 4), np.float64), {}, "64-bit floating-point samples x 1"),
        (np.zeros((4, 4, 3), np.int8), {}, "8-bit signed samples x 3"),
        (np.zeros((4, 4), np.uint16), {259: 34887}, "compression 34887"),  # LERC
        (np.zeros((4, 4, 3), np.uint8), {259: 50001}, "compression webp"),
    ],
)
def test_a_valid_tiff_of_an_unsupported_kind_is_not_called_damaged(
    values: np.ndarray, tags: dict[int, int], kind: str, tmp_path: Path
) -> None:
    reason = rf"^(damaged or )?a TIFF that is not supported \(.*{kind}.*\): convert it to JPEG or PNG"
    with pytest.raises(UnreadableImage, match=reason):
        decode(write_tiff(tmp_path / "x.tif", values, tags=tags))


def test_a_format_without_its_decoder_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bmp = bytearray(encoded("BMP"))
    bmp[28:30] = (2).to_bytes(2, "little")  # bits per pixel
    (tmp_path / "x.bmp").write_bytes(bmp)
    for name in ("x.heic", "x.avif"):
        noise_image(1).save(tmp_path / name)
    monkeypatch.setattr(image_formats, "HEIF_VERSION", None)
    monkeypatch.setattr(image_formats, "HAS_AVIF", False)
    monkeypatch.setattr(image_formats, "FORMATS", ("BMP",))
    for name, reason in (
        ("x.bmp", "not supported .Unsupported BMP pixel depth"),
        ("x.heic", r"an HEIC image, which needs the package pillow-heif: pip install 'regraft\[heic\]', or convert"),
        ("x.avif", "an AVIF image, which this build of Pillow cannot read: install Pillow 11.3 or later, or convert"),
    ):
        with pytest.raises(UnreadableImage, match=reason):
            decode(tmp_path / name)


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
                assert decode(str(path)).shape[2:] == (3,)
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
