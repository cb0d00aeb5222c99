"""The image formats that are read, and a description of files in other formats."""

import codecs
from importlib.metadata import version
from typing import BinaryIO, NamedTuple

# Importing a plugin registers its decoder. This is done here because registration is not thread-safe.
# The JPEG plugin also opens MPO files, which hold several images.
from PIL import (
    BmpImagePlugin,  # noqa: F401
    GifImagePlugin,  # noqa: F401
    Jpeg2KImagePlugin,  # noqa: F401
    JpegImagePlugin,  # noqa: F401
    MpoImagePlugin,  # noqa: F401
    PngImagePlugin,  # noqa: F401
    PpmImagePlugin,  # noqa: F401
    TgaImagePlugin,  # noqa: F401
    TiffImagePlugin,
    WebPImagePlugin,  # noqa: F401
    features,
)

try:
    from pillow_heif import register_heif_opener
except ImportError:
    HEIF_VERSION: str | None = None
else:
    register_heif_opener()
    HEIF_VERSION = version("pillow-heif")
HAS_AVIF = "avif" in features.modules and features.check("avif")
if HAS_AVIF:
    from PIL import AvifImagePlugin  # noqa: F401

FORMATS = (
    "JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP", "PPM", "JPEG2000",
    *(("AVIF",) if HAS_AVIF else ()), *(("HEIF",) if HEIF_VERSION else ()),
)  # fmt: skip
"""Formats by Pillow's names; a file is recognized by its content. Files that end in .tga may also be TGA."""
_FORMAT_NAMES = "JPEG, PNG, GIF, BMP, TIFF, WebP, PPM, JPEG 2000, AVIF, HEIC, TGA"
_CONVERT = "convert it to JPEG or PNG"

# First bytes of files that no decoder accepts: damaged images, and other files with the extension of an image.
_SIGNATURES = {
    b"\xff\xd8": "a JPEG file whose header is damaged or cut short",
    b"\x89PNG": "a PNG file whose header is damaged or cut short",
    b"GIF8": "a GIF file whose header is damaged or cut short",
    b"RIFF": "a RIFF file that is not a complete WEBP image",
    b"%!PS": "a PostScript file, not an image",
    b"%PDF": "a PDF file, not an image",
    b"PK\x03\x04": "a zip archive, not an image",
    b"<": "an HTML, SVG or XML file, not an image",
    b"8BPS": f"a Photoshop file: {_CONVERT}",
    b"\xff\x0a": f"a JPEG XL image, which is not supported: {_CONVERT}",
    b"\0\0\0\x0cJXL ": f"a JPEG XL image, which is not supported: {_CONVERT}",
}
_TIFF_SIGNATURES = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _EXTRA_SAMPLES, _SAMPLE_FORMAT = 258, 259, 262, 266, 338, 339
_BASIC_COMPRESSIONS = (1, 2, 3, 4, 5, 7, 8, 32773, 32946)  # none, CCITT, LZW, JPEG, deflate, PackBits
_SAMPLE_FORMATS = {1: "unsigned", 2: "signed", 3: "floating-point"}
_AVIF = f"an AVIF image, which this build of Pillow cannot read: install Pillow 11.3 or later, or {_CONVERT}"
_HEIC = f"an HEIC image, which needs the package pillow-heif: pip install 'regraft[heic]', or {_CONVERT}"
_AVIF_BRANDS = (b"avif", b"avis")  # of the ISO base media file format
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")


class TiffKind(NamedTuple):
    """How a TIFF stores its pixels."""

    description: str
    has_known_layout: bool
    """Whether Pillow knows this layout of samples."""
    has_basic_compression: bool
    """Whether every build of Pillow decompresses it."""


def formats_for(name: str) -> tuple[str, ...]:
    """Return the formats that a file may have. A TGA file has no signature, so its name decides."""
    return (*FORMATS, "TGA") if name.lower().endswith(".tga") else FORMATS


def describe_unidentified(file: BinaryIO) -> str:
    """Return what a file is that no decoder accepts."""
    file.seek(0)
    head = file.read(512)
    if head.startswith(_TIFF_SIGNATURES):
        kind = read_tiff_kind(file)
        if kind is None or kind.has_known_layout:
            return "a TIFF file whose directory is damaged or cut off"
        return f"a TIFF that is not supported ({kind.description}): {_CONVERT}"
    for signature, description in _SIGNATURES.items():
        if head.lstrip().startswith(signature):
            return description
    if head[4:8] == b"ftyp":
        return _describe_media_file(head[8:12])
    if _is_text(head):
        return "a text file, not an image"
    return f"not an image in a supported format ({_FORMAT_NAMES}), or its header is damaged"


def _describe_media_file(brand: bytes) -> str:
    for brands, is_supported, missing in ((_AVIF_BRANDS, HAS_AVIF, _AVIF), (_HEIC_BRANDS, HEIF_VERSION, _HEIC)):
        if brand in brands:
            return "an AVIF or HEIC image that is damaged or cut short" if is_supported else missing
    return f"a video or another file that is not supported: {_CONVERT}"


def read_tiff_kind(file: BinaryIO) -> TiffKind | None:
    """Return how a TIFF stores its pixels; None if its directory is damaged."""
    file.seek(0)
    try:
        header = file.read(8)
        tags = TiffImagePlugin.ImageFileDirectory_v2(header + file.read(8) if b"+" in header[:4] else header)
        file.seek(tags.next)
        tags.load(file)
        bits, formats, extra = tags.get(_BITS, (1,)), tags.get(_SAMPLE_FORMAT, (1,)), tags.get(_EXTRA_SAMPLES, ())
        compression, photometric = tags.get(_COMPRESSION, 1), tags[_PHOTOMETRIC]
        layout = (tags.prefix, photometric, tuple(sorted(set(formats))), tags.get(_FILL_ORDER, 1), bits, extra)
    except Exception:  # noqa: BLE001 (the parser may raise anything for a damaged directory)
        return None
    samples = f"{'/'.join(map(str, sorted(set(bits))))}-bit {_SAMPLE_FORMATS.get(formats[0], 'complex')} samples"
    name = TiffImagePlugin.COMPRESSION_INFO.get(compression, compression)
    return TiffKind(
        f"{samples} x {len(bits)}, compression {name}, photometric interpretation {photometric}",
        has_known_layout=layout in TiffImagePlugin.OPEN_INFO and compression in TiffImagePlugin.COMPRESSION_INFO,
        has_basic_compression=compression in _BASIC_COMPRESSIONS,
    )


def _is_text(head: bytes) -> bool:
    try:
        text = codecs.getincrementaldecoder("utf-8")().decode(head)  # the last character may be incomplete
    except UnicodeDecodeError:
        return False
    return all(character.isprintable() or character in "\t\r\n\ufeff" for character in text)
