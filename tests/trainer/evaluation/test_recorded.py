"""Tests that the evaluation of the best epoch is kept for the end of the run."""

from types import SimpleNamespace
from typing import Any

import pytest
from torch import nn

from trainer.evaluation import recorded
from trainer.evaluation.recorded import EpochEvaluator


class Evaluator:
    """Returns the number of its calls as evaluation."""

    num_logits = 10

    def __init__(self) -> None:
        self.calls: list[Any] = []

    def __call__(self, model: nn.Module, interrupted: Any, splits: Any = None, record: Any = None) -> Any:
        self.calls.append(record)
        return {"test": len(self.calls)}

    def make_gatherers(self) -> Any:
        return {"test": f"gatherer {len(self.calls) + 1}"}


def evaluate_epochs(evaluator: Evaluator, best: list[int]) -> EpochEvaluator:
    """Evaluate one epoch for each entry of `best`: the step of the best epoch after it."""
    state = SimpleNamespace(best=None, step=0)
    epochs = EpochEvaluator(evaluator, state)  # type: ignore[arg-type]
    for step, best_step in enumerate(best, start=1):
        state.step = step
        assert epochs(nn.Identity(), lambda: False) == {"test": step}
        state.best = SimpleNamespace(step=best_step)
    return epochs


@pytest.mark.parametrize(
    ("best", "kept"), [([1], {1}), ([1, 2, 3], {2, 3}), ([1, 1, 1], {1, 3}), ([1, 1, 3, 3], {3, 4})]
)
def test_best_and_latest_epoch_are_kept(best: list[int], kept: set[int]) -> None:
    epochs = evaluate_epochs(Evaluator(), best)
    found = {step: epochs.find(step) for step in range(6)}
    assert {step for step, entry in found.items() if entry is not None} == kept
    for step in kept:
        assert found[step] == ({"test": step}, {"test": f"gatherer {step}"})
    assert best[-1] in kept
    assert epochs.find(None) is None


def test_many_logits_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "_MAX_LOGITS", 9)
    evaluator = Evaluator()
    epochs = evaluate_epochs(evaluator, [1, 1])
    assert epochs.find(1) is epochs.find(2) is None
    assert evaluator.calls == [None, None]
