"""Calibration: reliability diagram, expected calibration error, and temperature scaling (Guo et al. 2017, On
calibration of modern neural networks).
"""

from dataclasses import dataclass

import torch

from trainer.evaluation.predictions import CHUNK, Predictions

NUM_BINS = 15
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.05, 20.0
_MAX_STEPS = 60


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
    reliability: tuple[ReliabilityBin, ...]


def calibrated_metrics(predictions: Predictions, temperature: float) -> CalibratedMetrics:
    """Return the metrics of predictions whose logits are divided by a temperature."""
    scaled = Predictions(predictions.logits / temperature, predictions.labels)
    bins = reliability_bins(scaled)
    return CalibratedMetrics(scaled.evaluation().loss, expected_calibration_error(bins), bins)


def fit_temperature(predictions: Predictions) -> float | None:
    """Return the temperature of the lowest log loss, from 0.05 to 20; None without a wrong prediction.

    The log loss of predictions that are all correct falls with the temperature, down to 0: it has no minimum.

    The log loss is a convex function of the inverse temperature. Its minimum is found by Newton's method, with a
    bisection where a step would leave the interval that holds the minimum.
    """
    if bool(predictions.correct.all()):
        return None
    inverse, low, high = 1.0, 1 / MAX_TEMPERATURE, 1 / MIN_TEMPERATURE
    for _ in range(_MAX_STEPS):
        slope, curvature = _derivatives(predictions, inverse)
        low, high = (low, inverse) if slope > 0 else (inverse, high)
        step = inverse - slope / curvature if curvature > 0 else low
        previous, inverse = inverse, step if low < step < high else (low + high) / 2
        if abs(inverse - previous) <= 1e-10 * inverse:
            break
    return 1 / inverse


def _derivatives(predictions: Predictions, inverse: float) -> tuple[float, float]:
    """Return the first and second derivative of the summed log loss by the inverse temperature."""
    slope = curvature = 0.0
    rows = max(1, CHUNK // predictions.logits.shape[1])
    for logits, labels in zip(predictions.logits.split(rows), predictions.labels.split(rows), strict=True):
        values = logits.double()
        probabilities = (inverse * values).softmax(1)
        mean = (probabilities * values).sum(1, keepdim=True)
        slope += (mean - values.gather(1, labels[:, None])).sum().item()
        curvature += (probabilities * (values - mean).square()).sum().item()
    return slope, curvature
