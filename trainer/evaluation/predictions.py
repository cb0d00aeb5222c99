"""Predictions of a split, and the table of them."""

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from trainer.evaluate import Evaluation
from trainer.run.atomic import write_atomically

COLUMNS = ("path", "split", "label", "prediction", "probability", "label_probability")
"""Columns of `predictions.csv`, in order."""
CHUNK = 1 << 22
"""Number of logits that are converted to float64 at once."""


@dataclass(frozen=True)
class Predictions:
    """Logits of a split, in the order of its examples. Of equal logits, the first class is predicted."""

    logits: Tensor
    """float32 [N, K], on the CPU."""
    labels: Tensor
    """int64 [N]."""

    @cached_property
    def log_normalizer(self) -> Tensor:
        """Return the logsumexp of the logits of each example, float64 [N]."""
        rows = max(1, CHUNK // self.logits.shape[1])
        return torch.cat([chunk.double().logsumexp(1) for chunk in self.logits.split(rows)])

    @cached_property
    def predicted(self) -> Tensor:
        """Return the predicted class of each example, int64 [N]."""
        return self.logits.argmax(1)

    @cached_property
    def correct(self) -> Tensor:
        """Return whether each prediction is correct, bool [N]."""
        return self.predicted == self.labels

    @cached_property
    def log_probability(self) -> Tensor:
        """Return the log probability of each example's label, float64 [N]."""
        return self.logits.gather(1, self.labels[:, None]).squeeze(1).double() - self.log_normalizer

    @cached_property
    def confidence(self) -> Tensor:
        """Return the probability of each example's predicted class, float64 [N]."""
        return (self.logits.amax(1).double() - self.log_normalizer).exp()

    def probability(self, label: int) -> Tensor:
        """Return the probability of a class for each example, float64 [N]."""
        return (self.logits[:, label].double() - self.log_normalizer).exp()

    def num_in_top(self, count: int) -> int:
        """Return how many examples have their label among the `count` largest logits."""
        total, classes = 0, torch.arange(self.logits.shape[1])
        rows = max(1, CHUNK // len(classes))
        for logits, labels in zip(self.logits.split(rows), self.labels[:, None].split(rows), strict=True):
            of_label = logits.gather(1, labels)
            rank = ((logits > of_label) | ((logits == of_label) & (classes < labels))).sum(1)
            total += int((rank < count).sum())
        return total

    def evaluation(self) -> Evaluation:
        """Return the loss and the counts of the predictions."""
        classes = self.logits.shape[1]

        def count(labels: Tensor) -> tuple[int, ...]:
            return tuple(torch.bincount(labels, minlength=classes).tolist())

        loss_sum = -self.log_probability.sum().item()
        return Evaluation(loss_sum, count(self.labels[self.correct]), count(self.labels), count(self.predicted))


def write_predictions(
    path: Path, splits: Mapping[str, tuple[Sequence[str], Predictions]], classes: Sequence[str]
) -> None:
    """Write a table with a row for each example, atomically.

    Args:
        path: CSV file.
        splits: split -> (paths of its examples, predictions).
        classes: names of the classes.

    """

    def rows() -> Iterable[tuple[str, ...]]:
        for split, (paths, predictions) in splits.items():
            columns = (
                predictions.labels.tolist(),
                predictions.predicted.tolist(),
                predictions.confidence.tolist(),
                predictions.log_probability.exp().tolist(),
            )
            for name, label, predicted, probability, label_probability in zip(paths, *columns, strict=True):
                numbers = (f"{value:.6g}" for value in (probability, label_probability))
                yield name, split, classes[label], classes[predicted], *numbers

    def write(temporary: Path) -> None:
        # As split.csv: names may hold bytes that are not UTF-8, and any other character.
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows(rows())

    write_atomically(path, write)
