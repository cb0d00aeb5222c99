"""Nearest neighbors: faiss finds those of scikit-learn."""

import numpy as np
import pytest

from trainer.check import neighbors
from trainer.errors import UserError


def clustered(count: int, size: int = 32) -> np.ndarray:
    """Return vectors around random centers, of any length, float32 [count, size]."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(count // 10, size))
    vectors = centers[random.integers(0, len(centers), count)] + 0.5 * random.normal(size=(count, size))
    return (vectors * random.uniform(0.1, 9, (count, 1))).astype(np.float32)


def test_neighbors_are_those_of_the_largest_cosine() -> None:
    features = clustered(200)
    similarities, found = neighbors.find_neighbors(features, 5)
    lengths = np.linalg.norm(features, axis=1)
    cosine = (features @ features.T) / np.outer(lengths, lengths)
    assert np.allclose(similarities, -np.sort(-cosine, axis=1)[:, :5], atol=1e-5)
    assert np.allclose(np.take_along_axis(cosine, found, axis=1), similarities, atol=1e-5)
    assert (found[:, 0] == np.arange(200)).all()


def test_faiss_finds_the_neighbors_of_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    features = clustered(3000)
    similarities, found = neighbors.find_neighbors(features, 5)
    monkeypatch.setattr(neighbors, "FAISS_FROM", 3000)
    for searched, least in ((12, 0.999), (3, 0.85)):  # all clusters, and some of them; 0.999: ties
        monkeypatch.setattr(neighbors, "SEARCHED_LISTS", searched)
        similar, also_found = neighbors.find_neighbors(features, 5)
        assert (found == also_found).mean() >= least
        assert np.isclose(similarities, similar, atol=1e-5).mean() >= least


def test_many_images_need_faiss(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    neighbors.require_faiss("--model", neighbors.FAISS_FROM - 1)
    with pytest.raises(UserError, match=r"needs the package faiss for 200,000 images.*regraft\[faiss\]"):
        neighbors.require_faiss("--model", neighbors.FAISS_FROM)
