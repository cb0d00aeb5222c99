"""From logits to answers: the most probable classes, or `unknown` below a threshold."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from regraft.contract import CONFIG
from trainer.errors import UserError
from trainer.model.metadata import ModelMetadata, UnknownThreshold, compute_score
from trainer.text import escape_unprintable

UNKNOWN = "unknown"
"""Label of an image whose score is below the threshold."""


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image."""

    labels: tuple[str, ...]
    """Class names, the most probable first."""
    scores: tuple[float, ...]
    """Their probabilities."""
    is_unknown: bool = False
    """Whether the score is below the threshold, so that the image may show none of the classes."""

    @property
    def label(self) -> str:
        """Return the most probable class, or `unknown` below the threshold."""
        return UNKNOWN if self.is_unknown else self.labels[0]

    @property
    def score(self) -> float:
        """Return the probability of the most probable class."""
        return self.scores[0]


@dataclass(frozen=True, kw_only=True)
class AnswerOptions:
    """How answers are made from logits."""

    topk: int = 1
    """Number of classes in a prediction; with fewer classes, all of them."""
    temperature: float = 1.0
    """The logits are divided by it."""
    threshold: float | UnknownThreshold | None = None
    """Least probability of the most probable class, or a threshold of another score; None: no image is unknown."""
    tta: bool = False
    """Test-time augmentation: average the logits of each image and of its mirror image."""


def make_predictions(logits: Tensor, classes: Sequence[str], options: AnswerOptions) -> list[Prediction]:
    """Return the prediction of each row of logits, float32 [B, K]. Of equal logits, the first class comes first."""
    # Sorted by the logits: probabilities may be rounded to equal values.
    indices = logits.argsort(dim=1, descending=True, stable=True)
    probabilities = (logits / options.temperature).softmax(1).gather(1, indices[:, : options.topk])
    threshold = options.threshold
    if isinstance(threshold, UnknownThreshold):
        unknown = (compute_score(logits, threshold.score) < threshold.threshold).tolist()
    else:
        unknown = [False] * len(logits) if threshold is None else (probabilities[:, 0] < threshold).tolist()
    # The shortest decimal numbers that are these float32 values.
    scores = [tuple(float(str(value)) for value in row) for row in np.asarray(probabilities.cpu())]
    names = [tuple(classes[index] for index in row) for row in indices[:, : options.topk].tolist()]
    return [Prediction(*row) for row in zip(names, scores, unknown, strict=True)]


def require_temperature(metadata: ModelMetadata, file: Path) -> float:
    """Return the temperature of a calibrated model, whose header is that of `file`.

    Raises:
        UserError: the model is not calibrated; the message has the command that calibrates it.

    """
    if metadata.temperature is None:
        raise UserError(
            f"the model is not calibrated: {escape_unprintable(str(file))} holds no temperature. This command fits and "
            f"stores one: {_evaluate_command(file)} --calibrate --store"
        )
    return metadata.temperature


def require_unknown_threshold(metadata: ModelMetadata, file: Path) -> UnknownThreshold:
    """Return the threshold of a model with a reject option, whose header is that of `file`.

    Raises:
        UserError: the model has none; the message has the command that stores one.

    """
    if metadata.unknown is None:
        raise UserError(
            f"--threshold saved: {escape_unprintable(str(file))} holds no threshold. This command stores one, where "
            f"FOLDER has images of none of the classes: {_evaluate_command(file)} --unknown FOLDER --store. Or give a "
            "probability such as --threshold 0.5"
        )
    return metadata.unknown


def _evaluate_command(file: Path) -> str:
    """Return the command that evaluates a model file: on the run's own images, or on DATA if it is in no run folder."""
    is_run = (file.parent / CONFIG).is_file()
    model = escape_unprintable(shlex.quote(str(file.parent if is_run else file)))
    return f"regraft evaluate {model}" if is_run else f"regraft evaluate {model} DATA"
