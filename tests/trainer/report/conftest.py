"""Metrics and evaluations of a small run."""

import pytest

from trainer.evaluate import Evaluation
from trainer.metrics import Metrics, Progress


@pytest.fixture
def progress() -> Progress:
    """Return the third step of the second epoch."""
    metrics = Metrics(loss_sum=6.0, correct=3, seen=4, seconds=2.0, compute_seconds=1.0, first_nonfinite_step=None)
    return Progress(epoch=2, epoch_step=3, step=7, metrics=metrics, lr={"backbone": 0.1, "head": 1.0})


@pytest.fixture
def evaluation() -> Evaluation:
    return Evaluation(loss_sum=5.0, correct=(2, 1), support=(3, 2), predicted=(4, 1))
