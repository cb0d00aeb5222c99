"""Calibration: reliability diagram, expected calibration error, and temperature scaling (Guo et al. 2017, On
calibration of modern neural networks).
"""

from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from trainer.evaluation.predictions import Predictions

NUM_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0


@dataclass(frozen=True)
class ReliabilityBin:
    """The predictions whose confidence is in (low, high]."""

    low: float
    high: float
    count: int
    confidence: float | None
    """Mean probability of the predicted class; None without predictions."""
    accuracy: float | None
    """Fraction of correct predictions; None without predictions."""


def reliability_bins(predictions: Predictions) -> tuple[ReliabilityBin, ...]:
    """Return the confidence and accuracy of the predictions in 15 bins of equal width."""
    confidence, correct = predictions.confidence, predictions.correct.double()
    # Bin b holds confidences in (b / 15, (b + 1) / 15].
    index = (confidence * NUM_BINS).ceil().long().sub(1).clamp(0, NUM_BINS - 1)
    counts = torch.bincount(index, minlength=NUM_BINS).tolist()
    confidences, accuracies = (
        torch.bincount(index, weights, minlength=NUM_BINS).tolist() for weights in (confidence, correct)
    )
    return tuple(
        ReliabilityBin(
            low=number / NUM_BINS,
            high=(number + 1) / NUM_BINS,
            count=count,
            confidence=confidences[number] / count if count else None,
            accuracy=accuracies[number] / count if count else None,
        )
        for number, count in enumerate(counts)
    )


def expected_calibration_error(bins: tuple[ReliabilityBin, ...]) -> float:
    """Return the mean difference between confidence and accuracy of the bins, weighted by their counts."""
    total = sum(entry.count for entry in bins)
    return sum(
        entry.count / total * abs(entry.accuracy - entry.confidence)
        for entry in bins
        if entry.accuracy is not None and entry.confidence is not None
    )


@dataclass(frozen=True)
class CalibratedMetrics:
    """Metrics of the probabilities after the logits were divided by a temperature."""

    log_loss: float
    ece: float
    """Expected calibration error."""


def calibrated_metrics(predictions: Predictions, temperature: float) -> CalibratedMetrics:
    """Return the metrics of predictions whose logits are divided by a temperature."""
    scaled = Predictions(predictions.logits / temperature, predictions.labels)
    return CalibratedMetrics(scaled.evaluation().loss, expected_calibration_error(reliability_bins(scaled)))


def fit_temperature(predictions: Predictions) -> float | None:
    """Return the temperature of the lowest log loss; None without a wrong prediction.

    The log loss of predictions that are all correct falls with the temperature, down to 0: it has no minimum.
    """
    if bool(predictions.correct.all()):
        return None
    logits = predictions.logits.double()
    log_temperature = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([log_temperature], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> float:
        optimizer.zero_grad()
        value = cross_entropy(logits / log_temperature.exp(), predictions.labels)
        value.backward()
        return value.item()

    with torch.enable_grad():
        optimizer.step(loss)
    return min(MAX_TEMPERATURE, max(MIN_TEMPERATURE, log_temperature.exp().item()))
