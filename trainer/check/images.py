"""Read each image of a dataset once: its content hash, size, format and mode, and a small thumbnail."""

# Creating a Path for each image would take longer than reading small ones.

import hashlib
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import BinaryIO, NamedTuple

import numpy as np
import simplejpeg
from PIL import Image

from trainer.check.alignment import SIZE
from trainer.data.decode import UnreachableImage, UnreadableImage, decode_file, exif_transpose, open_image_file
from trainer.data.image_formats import formats_for

_DECODED_SIZE = 2 * SIZE
"""JPEG files are decoded to at least this size [pixels], by the scaled DCT of the decoder."""
_BATCH_SIZE = 16  # images that a thread reads per task
_QUEUED_BATCHES = 256  # tasks that are in memory at once
_SWAPS_SIDES = {
    Image.Transpose.TRANSPOSE,
    Image.Transpose.TRANSVERSE,
    Image.Transpose.ROTATE_90,
    Image.Transpose.ROTATE_270,
}


class ImageFacts(NamedTuple):
    """What an image file holds."""

    reason: str | None
    """Why the image cannot be read; None if it can."""
    digest: str = ""
    """SHA-256 of the file in hexadecimal digits; empty if it cannot be read."""
    width: int = 0
    """Width of the upright image [pixels]; 0 if it cannot be read."""
    height: int = 0
    format: str = ""
    """Format of the content by Pillow's name, such as `JPEG`."""
    mode: str = ""
    """Colors of the file by Pillow's name, such as `RGB`, `L` or `RGBA`."""
    num_bytes: int = 0
    """Size of the file [bytes]."""


@dataclass(frozen=True)
class ImageTable:
    """What the files of a dataset hold, in the order of their paths."""

    facts: tuple[ImageFacts, ...]
    thumbnails: np.ndarray
    """Upright RGB images, uint8 [N, SIZE, SIZE, 3]; black for an unreadable one."""


def read_images(
    paths: Sequence[str], *, workers: int, on_progress: Callable[[int, int], None] | None = None
) -> ImageTable:
    """Read all images.

    Args:
        paths: the image files.
        workers: number of threads; decoders release the GIL.
        on_progress: called from time to time with (images read, total images).

    """
    thumbnails = np.zeros((len(paths), SIZE, SIZE, 3), dtype=np.uint8)
    facts: list[ImageFacts] = []

    def read_batch(rows: Sequence[int]) -> list[ImageFacts]:
        return [read_image(paths[row], thumbnails[row]) for row in rows]

    rows = iter(range(len(paths)))
    pool = ThreadPoolExecutor(max(1, workers))
    try:
        with warnings.catch_warnings(action="ignore"):  # Pillow warns of large images and of unusual metadata
            while window := list(itertools.islice(rows, _BATCH_SIZE * _QUEUED_BATCHES)):
                for batch in pool.map(read_batch, _batches(window)):
                    facts += batch
                    if on_progress is not None:
                        on_progress(len(facts), len(paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after Ctrl-C, do not read the images that are queued
    return ImageTable(tuple(facts), thumbnails)


def read_image(path: str, thumbnail: np.ndarray) -> ImageFacts:
    """Read one image, and write its thumbnail to uint8 [SIZE, SIZE, 3].

    What training cannot read is unreadable here too.
    """
    try:
        with open_image_file(path) as file:
            digest, num_bytes = _hash(file), file.tell()
            header = _read_header(file, path)
            pixels = _decode_reduced_jpeg(header, file) if header else None
            if pixels is None:
                file.seek(0)
                pixels = decode_file(file, path).pixels
                transpose = None
            else:
                transpose = header.transpose if header else None
    except UnreadableImage as error:
        return ImageFacts(str(error))
    # Before it is turned, since that is faster. The filter removes fine patterns, which would alias.
    image = Image.fromarray(pixels).resize((SIZE, SIZE), Image.Resampling.HAMMING)
    thumbnail[...] = np.asarray(image if transpose is None else image.transpose(transpose))
    if header is None:  # decoded, although its header could not be read alone
        return ImageFacts(None, digest, pixels.shape[1], pixels.shape[0], num_bytes=num_bytes)
    return ImageFacts(None, digest, *header.upright_size, header.format, header.mode, num_bytes)


class _Header(NamedTuple):
    format: str
    mode: str
    size: tuple[int, int]
    transpose: Image.Transpose | None
    """What makes the image upright."""

    @property
    def upright_size(self) -> tuple[int, int]:
        """Return (width, height)."""
        return self.size[::-1] if self.transpose in _SWAPS_SIDES else self.size


def _read_header(file: BinaryIO, path: str) -> _Header | None:
    """Return the header of an image; None if it is damaged, for which decoding gives the reason."""
    file.seek(0)
    try:
        with Image.open(file, formats=formats_for(path)) as stored:
            return _Header(stored.format or "", stored.mode, stored.size, exif_transpose(stored))
    except Exception:  # noqa: BLE001 (a decoder may raise anything for a damaged file)
        return None


def _decode_reduced_jpeg(header: _Header, file: BinaryIO) -> np.ndarray | None:
    """Return a gray or color JPEG as it is stored, RGB, uint8 [H, W, 3]; None for other and damaged images.

    The whole file is read and its entropy code is decoded, so that damage is noticed.
    """
    if header.format != "JPEG" or header.mode not in ("RGB", "L"):
        return None
    file.seek(0)
    try:
        pixels: np.ndarray = simplejpeg.decode_jpeg(
            file.read(), "RGB", min_height=_DECODED_SIZE, min_width=_DECODED_SIZE
        )
    except (ValueError, OSError, MemoryError):
        return None
    return pixels


def _hash(file: BinaryIO) -> str:
    try:
        return hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]
    except OSError as error:
        raise UnreachableImage(f"cannot be read ({error.strerror})") from None


def _batches(rows: Sequence[int]) -> Iterator[Sequence[int]]:
    for start in range(0, len(rows), _BATCH_SIZE):
        yield rows[start : start + _BATCH_SIZE]
