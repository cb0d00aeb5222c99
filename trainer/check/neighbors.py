"""Nearest neighbors by the cosine of feature vectors: by scikit-learn, and of very many vectors by faiss."""

import numpy as np

from trainer.errors import UserError

FAISS_FROM = 200_000
"""Number of vectors from which on faiss searches: the time of scikit-learn grows with its square."""
VECTORS_PER_LIST, SEARCHED_LISTS = 250, 32
"""Sizes of faiss' inverted file: vectors of a cluster (list), and how many of the nearest clusters are searched."""
_TRAINING_VECTORS_PER_LIST = 40  # enough for k-means


def require_scikit_learn(option: str) -> None:
    """Raise a UserError if scikit-learn, which `option` needs, is not installed."""
    try:
        import sklearn.neighbors  # noqa: F401, PLC0415 (an optional package, which takes a second to import)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package scikit-learn, which cannot be imported ({error}): pip install 'regraft[check]'"
        ) from None


def require_faiss(option: str, count: int) -> None:
    """Raise a UserError if `count` vectors are to be searched, which needs faiss, and it is not installed."""
    if count < FAISS_FROM:
        return
    try:
        import faiss  # noqa: F401, PLC0415 (an optional package)
    except ImportError as error:
        raise UserError(
            f"{option} needs the package faiss for {FAISS_FROM:,} images or more, which cannot be imported ({error}): "
            "pip install 'regraft[faiss]'"
        ) from None


def find_neighbors(features: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the cosine similarities and the positions of the nearest vectors, float32 and int64 [N, count].

    Args:
        features: vectors, float32 [N, D].
        count: number of neighbors of each vector, which is one of them itself.

    """
    norms = np.linalg.norm(features, axis=1, keepdims=True)
    normalized = features / np.maximum(norms, 1e-12)
    return _search_faiss(normalized, count) if len(features) >= FAISS_FROM else _search_scikit_learn(normalized, count)


def _search_scikit_learn(normalized: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.neighbors import NearestNeighbors  # noqa: PLC0415

    search = NearestNeighbors(n_neighbors=count, algorithm="brute", metric="euclidean").fit(normalized)
    distances, neighbors = search.kneighbors(normalized)
    return (1 - distances**2 / 2).astype(np.float32), neighbors


def _search_faiss(normalized: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the neighbors approximately: of N / VECTORS_PER_LIST clusters, only the nearest ones are searched."""
    import faiss  # noqa: PLC0415

    size, lists = normalized.shape[1], max(1, len(normalized) // VECTORS_PER_LIST)
    index = faiss.IndexIVFFlat(faiss.IndexFlatIP(size), size, lists, faiss.METRIC_INNER_PRODUCT)
    index.cp.max_points_per_centroid = _TRAINING_VECTORS_PER_LIST
    index.train(normalized)
    index.add(normalized)
    index.nprobe = min(SEARCHED_LISTS, lists)
    similarities, neighbors = index.search(normalized, count)
    return similarities, neighbors
