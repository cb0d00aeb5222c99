"""Perceptual hash (pHash) of images, and the search for images that show the same.

The hash finds candidates: it changes in a few bits if an image is encoded again, resized or cropped a little. Each
candidate is then confirmed by the correlation of the two thumbnails, after the crop that aligns them best.

Source of the hash: C. Zauner, "Implementation and Benchmarking of Perceptual Image Hash Functions", 2010 (DCT-based
hash): the signs of the lowest frequencies of the discrete cosine transform, relative to their median.
"""

from collections.abc import Callable, Iterator

import numpy as np

from trainer.check.alignment import SIZE, correlate, correlate_aligned, to_channels

MAX_DISTANCE = 16
"""Candidates differ in at most this many of the 63 bits. Two random images differ in about 32."""
MIN_CORRELATION = 0.9
"""Smallest correlation of the aligned thumbnails of two images that show the same."""
_MIN_UNALIGNED = 0.4
MIN_CONTRAST = 2.0
"""Smallest standard deviation of the gray values of a thumbnail: the hash of an image of one color is noise."""
_FREQUENCIES = 8
_MAX_CANDIDATES = 32
"""Candidates of an image that are confirmed: among many that look alike, such as pages of text, the nearest."""
_BATCH = 1024

_positions = np.arange(SIZE)
_DCT = np.cos(np.pi * (2 * _positions[None] + 1) * np.arange(_FREQUENCIES)[:, None] / (2 * SIZE)).astype(np.float32)
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)  # ITU-R BT.601, as Pillow converts to gray
_MIRROR = (-1.0) ** np.arange(_FREQUENCIES, dtype=np.float32)
"""Factor of each horizontal frequency that mirrors an image."""


def hash_thumbnails(thumbnails: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the hashes of images, and those of the mirrored images: uint64 [N] each.

    Args:
        thumbnails: RGB images, uint8 [N, SIZE, SIZE, 3].

    """
    hashes = np.zeros((2, len(thumbnails)), dtype=np.uint64)
    for start in range(0, len(thumbnails), _BATCH):
        spectrum = _DCT @ _to_gray(thumbnails[start : start + _BATCH]) @ _DCT.T
        for row, values in enumerate((spectrum, spectrum * _MIRROR)):
            hashes[row, start : start + _BATCH] = _hash_spectrum(values)
    return hashes[0], hashes[1]


def find_near_duplicates(
    thumbnails: np.ndarray, *, mask: np.ndarray | None = None, on_progress: Callable[[int, int], None] | None = None
) -> Iterator[tuple[int, int]]:
    """Yield pairs of images that show the same, as far as a perceptual hash can tell, also if one is mirrored.

    Of a group of near-duplicates, as many pairs are yielded as connect all of its images.

    Args:
        thumbnails: RGB images, uint8 [N, SIZE, SIZE, 3].
        mask: the images to compare, bool [N]; None compares all.
        on_progress: called from time to time with (images compared with all others, total images).

    """
    is_used = contrast(thumbnails) >= MIN_CONTRAST
    if mask is not None:
        is_used &= mask
    hashes, mirrored = hash_thumbnails(thumbnails)
    groups = np.arange(len(thumbnails))  # of each image; those that show the same have the same number
    queue: list[tuple[int, int, bool]] = []

    def confirm() -> Iterator[tuple[int, int]]:
        for one, other in confirm_candidates(thumbnails, np.array(queue, dtype=np.int64).reshape(-1, 3)):
            if groups[one] != groups[other]:
                groups[groups == groups[other]] = groups[one]
                yield one, other
        queue.clear()

    for one in np.flatnonzero(is_used).tolist():
        is_other = is_used[one + 1 :] & (groups[one + 1 :] != groups[one])
        is_full = False  # if so, the candidates of the next image depend on which of these are confirmed
        for is_mirrored, query in ((False, hashes[one]), (True, mirrored[one])):
            distances = np.bitwise_count(hashes[one + 1 :] ^ query)
            found = np.flatnonzero((distances <= MAX_DISTANCE) & is_other)
            if len(found) > _MAX_CANDIDATES:
                found = found[np.argsort(distances[found], kind="stable")[:_MAX_CANDIDATES]]
                is_full = True
            queue += [(one, other, is_mirrored) for other in (found + one + 1).tolist()]
        if is_full or len(queue) >= _BATCH:
            yield from confirm()
        if on_progress is not None and one % _BATCH == 0:
            on_progress(one, len(thumbnails))
    yield from confirm()


def contrast(thumbnails: np.ndarray) -> np.ndarray:
    """Return the standard deviation of the gray values of each thumbnail, float32 [N]."""
    starts = range(0, len(thumbnails), _BATCH)
    batches = [_to_gray(thumbnails[start : start + _BATCH]).std(axis=(1, 2)) for start in starts]
    return np.concatenate(batches or [np.empty(0, dtype=np.float32)])


def _to_gray(thumbnails: np.ndarray) -> np.ndarray:
    gray: np.ndarray = thumbnails.astype(np.float32) @ _LUMA
    return gray


def _hash_spectrum(spectrum: np.ndarray) -> np.ndarray:
    values = spectrum.reshape(len(spectrum), -1)[:, 1:]  # without the mean brightness
    bits = values > np.median(values, axis=1, keepdims=True)
    padded = np.pad(bits, ((0, 0), (1, 0)))
    packed: np.ndarray = np.packbits(padded, axis=1).view(np.uint64)
    return packed[:, 0]


def confirm_candidates(thumbnails: np.ndarray, candidates: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield the pairs (one, other) whose thumbnails correlate.

    Args:
        thumbnails: RGB images, uint8 [N, SIZE, SIZE, 3].
        candidates: int64 [C, 3]: the positions of two images, and 1 if the first one is to be mirrored.

    """
    for start in range(0, len(candidates), _BATCH):
        ones, others, mirrored = candidates[start : start + _BATCH].T
        images, targets = to_channels(thumbnails[ones]), to_channels(thumbnails[others])
        is_mirrored = mirrored.astype(bool)
        images[is_mirrored] = images[is_mirrored][..., ::-1]
        correlation = correlate(images, targets)
        rows = np.flatnonzero((correlation >= _MIN_UNALIGNED) & (correlation < MIN_CORRELATION))
        correlation[rows] = correlate_aligned(images[rows], targets[rows])
        rows = np.flatnonzero(correlation >= MIN_CORRELATION)
        yield from zip(ones[rows].tolist(), others[rows].tolist(), strict=True)
