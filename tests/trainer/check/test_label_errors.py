"""Likely label errors by confident learning, on embeddings with planted errors."""

import numpy as np
import pytest
import torch

from trainer.check.label_errors import score_labels
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # these problems are small


def embeddings(labels: np.ndarray, *, size: int = 8, noise: float = 0.5) -> np.ndarray:
    """Return float32 [N, size] that show the class in one of the first entries."""
    random = np.random.default_rng(0)
    return (np.eye(size)[labels] + noise * random.normal(size=(len(labels), size))).astype(np.float32)


@pytest.mark.parametrize("classes", [2, 5])
def test_planted_errors_come_first(classes: int) -> None:
    random = np.random.default_rng(1)
    labels = random.integers(0, classes, 400)
    flipped = random.permutation(400)[:20]
    given = labels.copy()
    given[flipped] = (labels[flipped] + 1) % classes
    scores = score_labels(embeddings(labels, noise=0.3), given.tolist(), range(400), seed=0)
    assert len({*scores.ranking[:40].tolist()} & {*flipped.tolist()}) >= 18
    found = [row for row in scores.errors if row in flipped]
    assert len(found) >= 0.8 * len(scores.errors)
    assert (scores.suggested[found] == labels[found]).mean() >= 0.9
    assert scores.errors.tolist() == [row for row in scores.ranking if scores.is_error[row]]
    assert (scores.margin[scores.errors] < 0).all()


def test_the_prediction_of_an_example_does_not_depend_on_its_group() -> None:
    """A wrong label that is there twice would confirm itself."""
    random = np.random.default_rng(2)
    labels = random.integers(0, 2, 200)
    features = embeddings(labels, size=100, noise=0.15)
    given = labels.copy()
    given[:10] = 1 - labels[:10]
    copies = [*range(200), *(list(range(10)) * 5)]
    scores = score_labels(features[copies], given[copies].tolist(), copies, seed=0)
    alone = score_labels(features[copies], given[copies].tolist(), range(250), seed=0)
    assert scores.margin[:10].mean() < alone.margin[:10].mean() - 0.5
    assert scores.is_error[:10].sum() >= 5 > alone.is_error[:10].sum()


def test_the_scores_are_the_same_each_time_and_small_classes_are_no_error() -> None:
    labels = np.array([0] * 30 + [1] * 30 + [2] * 2 + [3])
    one, other = (score_labels(embeddings(labels), labels.tolist(), range(63), seed=3) for _ in range(2))
    assert np.array_equal(one.margin, other.margin)
    assert one.accuracy > 0.8
    with pytest.raises(UserError, match="in 3 images: expected a class with two images"):
        score_labels(embeddings(labels[:3]), [0, 0, 0], [7, 7, 7], seed=0)
