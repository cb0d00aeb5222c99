"""Perceptual hash (pHash) of images, and the search for images that show the same.

The hash finds candidates: it changes in a few bits if an image is encoded again, resized or cropped a little. Each
candidate is then confirmed by the correlation of the two thumbnails, after the crop that aligns them best.

Source of the hash: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (DCT-based
hash): the signs of the lowest frequencies of the discrete cosine transform, relative to their median.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

SIZE = 32
"""Height and width of a thumbnail [pixels]."""
MAX_DISTANCE = 16
"""Candidates differ in at most this many of the 63 bits. Two random images differ in about 32."""
MIN_CORRELATION = 0.9
"""Smallest correlation of the aligned thumbnails of two images that show the same."""
_MIN_UNALIGNED = 0.4
MIN_CONTRAST = 2.0
"""Smallest standard deviation of a thumbnail [8-bit values]: the hash of an image of one color is noise."""
_FREQUENCIES = 8
_CROP_STEP, _CROP_STEPS = 0.025, 4
_MAX_CANDIDATES = 32
"""Candidates of an image that are confirmed: among many that look alike, such as pages of text, the nearest."""
_BATCH = 1024

_positions = np.arange(SIZE)
_DCT = np.cos(np.pi * (2 * _positions[None] + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * SIZE)).astype(np.float32)
_MIRROR = (-1.0) ** np.arange(_FREQUENCIES, dtype=np.float32)
"""Factor of each horizontal frequency that mirrors an image."""


class Candidate(NamedTuple):
    """Two images, by their positions."""

    one: int
    other: int
    is_mirrored: bool
    """Whether the hash of the first one is that of its mirrored image."""


def hash_thumbnails(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of images, and those of the mirrored images: uint64 [N] each.

    Args:
        thumbnails: gray images, uint8 [N, SIZE, SIZE].

    """
    hashes = np.zeros((2, len(thumbnails)), dtype=np.uint64)
    for start in range(0, len(thumbnails), _BATCH):
        batch = thumbnails[start : start + _BATCH].astype(np.float32)
        spectrum = _DCT @ batch @ _DCT.T
        for row, values in enumerate((spectrum, spectrum * _MIRROR)):
            hashes[row, start : start + _BATCH] = _hash_spectrum(values)
    return hashes[0], hashes[1]


def find_near_duplicates(
    thumbnails: np.ndarray, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Yield pairs of images that show the same, as far as a perceptual hash can tell, also if one is mirrored.

    Of a group of near-duplicates, as many pairs are yielded as connect all of its images.

    Args:
        thumbnails: gray images, uint8 [N, SIZE, SIZE].
        on_progress: called from time to time with (images compared with all others, total images).

    """
    usable = np.flatnonzero(contrast(thumbnails) >= MIN_CONTRAST)
    usable_thumbnails = thumbnails[usable]
    hashes, mirrored = hash_thumbnails(usable_thumbnails)
    groups = np.arange(len(usable))  # of each image; those that show the same have the same number
    queue: list[Candidate] = []

    def confirm() -> Iterator[tuple[int, int]]:
        for one, other in confirm_candidates(usable_thumbnails, queue):
            if groups[one] != groups[other]:
                groups[groups == groups[other]] = groups[one]
                yield int(usable[one]), int(usable[other])
        queue.clear()

    for one in range(len(usable)):
        is_other = groups[one + 1 :] != groups[one]
        is_full = False  # if so, the candidates of the next image depend on which of these are confirmed
        for is_mirrored, query in ((False, hashes[one]), (True, mirrored[one])):
            distances = np.bitwise_count(hashes[one + 1 :] ^ query)
            found = np.flatnonzero((distances <= MAX_DISTANCE) & is_other)
            if len(found) > _MAX_CANDIDATES:
                found = found[np.argsort(distances[found], kind="stable")[:_MAX_CANDIDATES]]
                is_full = True
            queue += [Candidate(one, other, is_mirrored) for other in (found + one + 1).tolist()]
        if is_full or len(queue) >= _BATCH:
            yield from confirm()
        if on_progress is not None and one % _BATCH == 0:
            on_progress(one, len(usable))
    yield from confirm()


def correlate_aligned(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the largest correlation of each pair when either image is cropped by up to 10 % of its sides.

    Args:
        images: float32 [P, SIZE, SIZE].
        others: float32 [P, SIZE, SIZE].

    """
    return np.maximum(_correlate_cropped(images, others), _correlate_cropped(others, images))


def contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Return the standard deviation of each thumbnail; in batches, since NumPy computes it in float64."""
    starts = range(0, len(thumbnails), _BATCH)
    return np.concatenate([thumbnails[start : start + _BATCH].std(axis=(1, 2)) for start in starts] or [np.empty(0)])


def _hash_spectrum(spectrum: np.ndarray) -> np.ndarray:
    values = spectrum.reshape(len(spectrum), -1)[:, 1:]  # without the mean brightness
    bits = values > np.median(values, axis=1, keepdims=True)
    padded = np.pad(bits, ((0, 0), (1, 0)))
    return np.packbits(padded, axis=1).view(np.uint64)[:, 0]


def confirm_candidates(thumbnails: np.ndarray, candidates: Sequence[Candidate]) -> Iterator[tuple[int, int]]:
    """Yield the pairs (one, other) whose thumbnails correlate."""
    for start in range(0, len(candidates), _BATCH):
        ones, others, is_mirrored = (
            np.array(column) for column in zip(*candidates[start : start + _BATCH], strict=True)
        )
        images = thumbnails[ones].astype(np.float32)
        images[is_mirrored] = images[is_mirrored][:, :, ::-1]
        targets = thumbnails[others].astype(np.float32)
        correlation = _correlate(images, targets)
        rows = np.flatnonzero((correlation >= _MIN_UNALIGNED) & (correlation < MIN_CORRELATION))
        correlation[rows] = correlate_aligned(images[rows], targets[rows])
        rows = np.flatnonzero(correlation >= MIN_CORRELATION)
        yield from zip(ones[rows].tolist(), others[rows].tolist(), strict=True)


def _correlate(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    return np.einsum("...ij,...ij->...", _normalize(images), _normalize(others))


def _normalize(images: np.ndarray) -> np.ndarray:
    centered = images - images.mean(axis=(-2, -1), keepdims=True)
    norms = np.sqrt(np.square(centered).sum(axis=(-2, -1), keepdims=True))
    return centered / np.maximum(norms, 1e-6)


def _correlate_cropped(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation of the best crop of each image with the other: columns are cropped first, then rows."""
    columns = np.einsum("pij,cxj->pcix", images, _CROPS, optimize=True)
    best = _correlate(columns, others[:, None]).argmax(axis=1)
    cropped = columns[np.arange(len(images)), best]
    rows = np.einsum("cyi,pij->pcyj", _CROPS, cropped, optimize=True)
    return _correlate(rows, others[:, None]).max(axis=1)


def _crop_matrix(begin: float, end: float) -> np.ndarray:
    """Return the matrix [SIZE, SIZE] that resizes the part from `begin` to `end` of a row to its whole length."""
    edges = np.linspace(begin * SIZE, end * SIZE, SIZE + 1)
    centers = ((edges[:-1] + edges[1:]) / 2 - 0.5).clip(0, SIZE - 1)
    left = np.floor(centers).astype(int).clip(max=SIZE - 2)
    matrix = np.zeros((SIZE, SIZE), dtype=np.float32)
    matrix[_positions, left] = left + 1 - centers
    matrix[_positions, left + 1] = centers - left
    return matrix


_CROPS = np.stack(
    [
        _crop_matrix(before * _CROP_STEP, 1 - after * _CROP_STEP)
        for before in range(_CROP_STEPS + 1)
        for after in range(_CROP_STEPS + 1 - before)
    ]
)
