"""Find near-duplicates by embeddings: the nearest neighbors of each image, confirmed by their thumbnails."""

from collections.abc import Iterator

import numpy as np

from trainer.check.neighbors import find_neighbors
from trainer.check.perceptual_hash import MIN_CONTRAST, confirm_candidates, contrast

NEIGHBORS = 10
_MIN_SIMILARITY = 0.5
"""Smallest cosine similarity of the embeddings of a candidate, after the mean over all images is subtracted."""


def find_by_embeddings(features: np.ndarray, thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of images that show the same, also if one is mirrored.

    Args:
        features: embeddings, float32 [N, D].
        thumbnails: as for `find_near_duplicates`.

    """
    count = min(NEIGHBORS + 1, len(features))  # the image itself is one of them
    similarities, neighbors = find_neighbors(features - features.mean(axis=0), count)
    ones, others = np.repeat(np.arange(len(features)), count), neighbors.ravel()
    has_contrast = contrast(thumbnails) >= MIN_CONTRAST
    is_near = (similarities.ravel() >= _MIN_SIMILARITY) & (ones != others)
    kept = is_near & has_contrast[ones] & has_contrast[others]
    pairs = np.unique(np.sort(np.stack([ones, others], axis=1)[kept], axis=1), axis=0)
    candidates = np.concatenate([np.insert(pairs, 2, is_mirrored, axis=1) for is_mirrored in (False, True)])
    yield from dict.fromkeys(confirm_candidates(thumbnails, candidates))
