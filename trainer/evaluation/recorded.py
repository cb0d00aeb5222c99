"""Keep the predictions of epochs, so that the final evaluation need not repeat the evaluation of the best one."""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import nn

from trainer.evaluate import Evaluations, Record
from trainer.evaluation.gather import PredictionGatherer
from trainer.state import TrainState

_MAX_LOGITS = 1 << 26
"""Predictions of more logits (256 MB) are not kept."""


class RecordingEvaluator(Protocol):
    """Evaluates splits over all processes, and passes their logits on."""

    @property
    def num_logits(self) -> int:
        """Return the number of logits of all splits."""

    def __call__(
        self,
        model: nn.Module,
        interrupted: Callable[[], bool],
        splits: Sequence[str] | None = None,
        record: Mapping[str, Record] | None = None,
    ) -> Evaluations:
        """Return split -> evaluation."""

    def make_gatherers(self) -> dict[str, PredictionGatherer]:
        """Return what gathers the logits of each split on rank 0."""


class RecordedEvaluation(NamedTuple):
    """The evaluations of a model, and what has gathered its predictions on rank 0."""

    evaluations: Evaluations
    gatherers: Mapping[str, PredictionGatherer]


class EpochEvaluator:
    """Evaluates each epoch of a run, and keeps the predictions of the latest and the best one."""

    def __init__(self, evaluator: RecordingEvaluator, state: TrainState) -> None:
        """Take the evaluator of the splits, and the state, whose best epoch the checkpoint manager updates."""
        self._evaluator, self._state = evaluator, state
        self._by_step: dict[int, RecordedEvaluation] = {}

    def __call__(self, model: nn.Module, interrupted: Callable[[], bool]) -> Evaluations:
        """Return the evaluation of each split. Every process must call it; see `evaluate`."""
        if self._evaluator.num_logits > _MAX_LOGITS:
            return self._evaluator(model, interrupted)
        best = self._state.best
        self._by_step = {step: kept for step, kept in self._by_step.items() if best is not None and step == best.step}
        recorded = record(self._evaluator, model, interrupted)
        self._by_step[self._state.step] = recorded
        return recorded.evaluations

    def find(self, step: int | None) -> RecordedEvaluation | None:
        """Return the evaluation after a number of updates, on all ranks or on none; None if it was not kept."""
        return None if step is None else self._by_step.get(step)


def record(evaluator: RecordingEvaluator, model: nn.Module, interrupted: Callable[[], bool]) -> RecordedEvaluation:
    """Evaluate all splits, and gather their predictions. Every process must call it; see `evaluate`."""
    gatherers = evaluator.make_gatherers()
    return RecordedEvaluation(evaluator(model, interrupted, record=gatherers), gatherers)
