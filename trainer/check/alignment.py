"""Correlation of two thumbnails, after the crop that aligns them best."""

import numpy as np

SIZE = 32
"""Height and width of a thumbnail [pixels]."""
_CROP_STEP, _CROP_STEPS = 0.025, 4
"""A crop removes up to _CROP_STEPS steps, as fractions of a side, before and after what it keeps."""


def to_channels(thumbnails: np.ndarray) -> np.ndarray:
    """Return thumbnails, uint8 [P, SIZE, SIZE, 3], as float32 [P, 3, SIZE, SIZE]."""
    return np.ascontiguousarray(thumbnails.transpose(0, 3, 1, 2), dtype=np.float32)


def correlate(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation of each pair over positions and colors; both are [..., channels, SIZE, SIZE]."""
    result: np.ndarray = np.einsum("...cij,...cij->...", _normalize(images), _normalize(others))
    return result


def correlate_aligned(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation of each pair if either image is cropped so that it resembles the other most.

    Args:
        images: float32 [P, 3, SIZE, SIZE].
        others: float32 [P, 3, SIZE, SIZE].

    """
    larger: np.ndarray = np.maximum(_correlate_cropped(images, others), _correlate_cropped(others, images))
    return larger


def _normalize(images: np.ndarray) -> np.ndarray:
    centered = images - images.mean(axis=(-2, -1), keepdims=True)
    norms = np.sqrt(np.square(centered).sum(axis=(-3, -2, -1), keepdims=True))
    normalized: np.ndarray = centered / np.maximum(norms, 1e-6)
    return normalized


def _correlate_cropped(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the correlation of the best crop of each image: by gray values, of its columns first, then of its rows."""
    gray = images.mean(axis=1, keepdims=True)
    target = others.mean(axis=1, keepdims=True)[:, None]  # [P, 1, 1, SIZE, SIZE]
    crops = _CROPS[:, None]
    columns = correlate(gray[:, None] @ crops.transpose(0, 1, 3, 2), target).argmax(axis=1)
    cropped = images @ _CROPS[columns][:, None].transpose(0, 1, 3, 2)
    rows = correlate(crops @ cropped.mean(axis=1, keepdims=True)[:, None], target).argmax(axis=1)
    return correlate(_CROPS[rows][:, None] @ cropped, others)


def _crop_matrix(begin: float, end: float) -> np.ndarray:
    """Return the matrix [SIZE, SIZE] that resizes the part from `begin` to `end` of a column to its whole length."""
    edges = np.linspace(begin * SIZE, end * SIZE, SIZE + 1)
    centers = ((edges[:-1] + edges[1:]) / 2 - 0.5).clip(0, SIZE - 1)
    left = np.floor(centers).astype(int).clip(max=SIZE - 2)
    matrix = np.zeros((SIZE, SIZE), dtype=np.float32)
    matrix[np.arange(SIZE), left] = left + 1 - centers
    matrix[np.arange(SIZE), left + 1] = centers - left
    return matrix


_CROPS = np.stack(
    [
        _crop_matrix(before * _CROP_STEP, 1 - after * _CROP_STEP)
        for before in range(_CROP_STEPS + 1)
        for after in range(_CROP_STEPS + 1 - before)
    ]
)
"""float32 [crops, SIZE, SIZE]."""
