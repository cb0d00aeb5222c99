"""Write PNG and TIFF files of any sample format; Pillow writes few, and may read another format than it writes."""

import struct
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

_COLOR_TYPES = {1: 0, 2: 4, 3: 2, 4: 6}  # of PNG, by the number of channels


def write_png(path: Path, values: np.ndarray, *, bits: int = 16, chunks: Mapping[bytes, bytes] | None = None) -> Path:
    """Write values [height, width] or [height, width, channels] with `bits` bits per sample."""
    height, width, channels = values.shape if values.ndim == 3 else (*values.shape, 1)
    samples = values.reshape(height, -1)
    if bits < 8:
        unpacked = np.unpackbits(samples.astype(np.uint8)[..., None], axis=-1)[..., 8 - bits :]
        rows = np.packbits(unpacked.reshape(height, -1), axis=1)
    else:
        rows = samples.astype(f">u{bits // 8}")
    header = struct.pack(">IIBBBBB", width, height, bits, _COLOR_TYPES[channels], 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    content = [(b"IHDR", header), *(chunks or {}).items(), (b"IDAT", pixels), (b"IEND", b"")]
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(kind, body) for kind, body in content))
    return path


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def write_tiff(
    path: Path,
    values: np.ndarray | bytes,
    size: tuple[int, int] | None = None,
    *,
    bits: int = 16,
    order: str = "<",
    deflate: bool = False,
    tags: Mapping[int, int | float | Sequence[int]] | None = None,
) -> Path:
    """Write a TIFF of one strip.

    Args:
        path: the file.
        values: [height, width] or [height, width, channels] of any dtype, or packed samples of `bits` bits.
        size: (width, height) of packed samples.
        bits: bits of a packed sample.
        order: byte order, `<` or `>`.
        deflate: whether to compress the strip.
        tags: other tags, or other values of the tags.

    """
    channels = 1
    if isinstance(values, np.ndarray):
        size, bits = (values.shape[1], values.shape[0]), values.dtype.itemsize * 8
        channels = values.shape[2] if values.ndim == 3 else 1
        data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    else:
        data = values
    assert size is not None
    data = zlib.compress(data) if deflate else data
    entries: dict[int, int | float | Sequence[int]] = {
        256: size[0], 257: size[1], 258: [bits] * channels, 259: 8 if deflate else 1, 262: 1 if channels == 1 else 2,
        273: 8, 277: channels, 278: size[1], 279: len(data),
    }  # fmt: skip
    kind = values.dtype.kind if isinstance(values, np.ndarray) else "u"
    entries |= {339: [{"u": 1, "i": 2, "f": 3}[kind]] * channels} | dict(tags or {})
    offset = 8 + len(data)
    directory, extra = struct.pack(f"{order}H", len(entries)), b""
    extra_offset = offset + 2 + 12 * len(entries) + 4
    for tag, value in sorted(entries.items()):
        number = list(value) if isinstance(value, Sequence) else [value]
        letter, code = ("f", 11) if isinstance(number[0], float) else ("H", 3) if tag != 279 else ("I", 4)
        packed = struct.pack(f"{order}{len(number)}{letter}", *number)
        if len(packed) > 4:
            packed, extra = struct.pack(f"{order}I", extra_offset + len(extra)), extra + packed
        directory += struct.pack(f"{order}HHI", tag, code, len(number)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    path.write_bytes(magic + struct.pack(f"{order}I", offset) + data + directory + b"\0\0\0\0" + extra)
    return path
