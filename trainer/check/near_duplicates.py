"""Find near-duplicates by embeddings: the nearest neighbors of each image, confirmed by their thumbnails."""

from collections.abc import Iterator

import numpy as np

from trainer.check.perceptual_hash import MIN_CONTRAST, Candidate, confirm_candidates, contrast
from trainer.errors import UserError

NEIGHBORS = 10
_MIN_SIMILARITY = 0.5
"""Smallest cosine similarity of the embeddings of a candidate, after the mean over all images is subtracted."""


def require_scikit_learn(option: str) -> None:
    """Raise a UserError if scikit-learn, which `option` needs, is not installed."""
    try:
        import sklearn.neighbors  # noqa: F401, PLC0415 (an optional package, which takes a second to import)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package scikit-learn, which cannot be imported ({error}): pip install 'regraft[check]'"
        ) from None


def find_by_embeddings(features: np.ndarray, thumbnails: np.ndarray) -> Iterator[tuple[int, int]]:
    """Yield pairs of images that show the same, also if one is mirrored.

    Args:
        features: embeddings, float32 [N, D].
        thumbnails: as for `find_near_duplicates`.

    """
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    centered = features - features.mean(axis=0)
    count = min(NEIGHBORS + 1, len(features))  # the image itself is one of them
    distances, neighbors = NearestNeighbors(n_neighbors=count, metric="cosine").fit(centered).kneighbors(centered)
    rows = np.repeat(np.arange(len(features)), count)
    has_contrast = contrast(thumbnails) >= MIN_CONTRAST
    is_near = (distances.ravel() <= 1 - _MIN_SIMILARITY) & (rows != neighbors.ravel())
    kept = is_near & has_contrast[rows] & has_contrast[neighbors.ravel()]
    pairs = np.unique(np.sort(np.stack([rows, neighbors.ravel()], axis=1)[kept], axis=1), axis=0)
    candidates = [Candidate(one, other, mirrored) for one, other in pairs.tolist() for mirrored in (False, True)]
    yield from dict.fromkeys(confirm_candidates(thumbnails, candidates))
