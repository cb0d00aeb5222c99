"""Evaluate a model: loss, accuracy and counts per class. Every example is counted once, on any number of processes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

Record = Callable[[Tensor, Tensor, Tensor], None]
"""Receives the logits, float32 [B, K], labels and examples, int64 [B], of a batch. B may be 0."""
SelectBy = Literal["accuracy", "balanced_accuracy", "f1_macro", "log_loss"]
"""Metric that selects the best epoch."""


def choose_eval_batch_size(device: torch.device, *, threads: int, largest: int = 128) -> int:
    """Return how many images are evaluated or predicted at once.

    On a CPU a few per thread, so that activations stay in its caches (SqueezeNet at 224 px on two threads: batches of
    8 take 0.6 of the time of batches of 128).

    Args:
        device: computes the batch.
        threads: number of threads that compute it, on a CPU.
        largest: number of images that a GPU computes at once.

    """
    return max(8, 4 * threads if device.type == "cpu" else largest)


def selection_score(metric: SelectBy, value: float, loss: float) -> tuple[float, float]:
    """Return the key to compare epochs by: the better metric, then the lower loss."""
    return (-value if metric == "log_loss" else value), -loss


@dataclass(frozen=True)
class Evaluation:
    """Loss and counts of one split. Counts are per class, in the order of the classes."""

    loss_sum: float
    """Summed cross-entropy."""
    correct: tuple[int, ...]
    """Number of correct predictions of each class."""
    support: tuple[int, ...]
    """Number of examples of each class."""
    predicted: tuple[int, ...]
    """How often each class was predicted."""

    @property
    def seen(self) -> int:
        """Return the number of examples evaluated."""
        return sum(self.support)

    @property
    def accuracy(self) -> float:
        """Return the fraction of correct predictions."""
        return sum(self.correct) / self.seen

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy."""
        return self.loss_sum / self.seen

    @property
    def precision(self) -> tuple[float, ...]:
        """Return the fraction of correct predictions among those of each class; 0 if it was never predicted."""
        return tuple(map(_ratio, self.correct, self.predicted))

    @property
    def recall(self) -> tuple[float, ...]:
        """Return the fraction of correct predictions among the examples of each class; 0 if it has none."""
        return tuple(map(_ratio, self.correct, self.support))

    @property
    def f1(self) -> tuple[float, ...]:
        """Return the harmonic mean of precision and recall of each class."""
        totals = map(int.__add__, self.support, self.predicted)
        return tuple(_ratio(2 * correct, total) for correct, total in zip(self.correct, totals, strict=True))

    @property
    def balanced_accuracy(self) -> float:
        """Return the mean recall of the classes that have examples, as scikit-learn does."""
        return _mean(recall for recall, support in zip(self.recall, self.support, strict=True) if support)

    @property
    def f1_macro(self) -> float:
        """Return the mean F1 of the classes that have examples or were predicted, as scikit-learn does."""
        totals = map(int.__add__, self.support, self.predicted)
        return _mean(f1 for f1, total in zip(self.f1, totals, strict=True) if total)

    def score(self, metric: SelectBy) -> tuple[float, float]:
        """Return the key to compare epochs by; see `selection_score`."""
        value: float = self.loss if metric == "log_loss" else getattr(self, metric)
        return selection_score(metric, value, self.loss)

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the accuracy."""
        return wilson_interval(sum(self.correct), self.seen)


def _ratio(part: int, total: int) -> float:
    return part / total if total else 0.0


def _mean(values: Iterable[float]) -> float:
    listed = list(values)
    return math.fsum(listed) / len(listed)


Evaluations = dict[str, Evaluation]
"""Split (`test`, `val`) -> its evaluation."""


class Interrupted(Exception):
    """The evaluation was stopped before its end."""


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927); z = 1.96 is the 95 % interval.

    Unlike the normal approximation, it stays within [0, 1] and is not empty for 0 or `trials` successes.
    """
    proportion = successes / trials
    scale = 1 + z * z / trials
    center = (proportion + z * z / (2 * trials)) / scale
    half = z * math.sqrt(proportion * (1 - proportion) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, center - half), min(1.0, center + half)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor, Tensor]],
    *,
    classes: int,
    expected: int,
    normalize: Callable[[Tensor], Tensor],
    reduce: Callable[[Tensor], Tensor],
    device: torch.device,
    num_batches: int,
    interrupted: Callable[[], bool],
    record: Record | None = None,
) -> Evaluation:
    """Run the model over this process's batches and return the sums over all processes.

    Args:
        model: not wrapped by DDP, so that processes may have different numbers of batches. Its mode is restored.
        batches: (images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]) of this process.
        classes: number of classes, C.
        expected: number of examples that all processes together must have seen.
        normalize: images uint8 [B, 3, H, W] -> the model's input.
        reduce: sums a float64 tensor over all processes.
        device: holds the sums, which are read once, at the end.
        num_batches: number of batches of the process that has most of them.
        interrupted: called before each batch, by all processes together; returns whether to stop.
        record: called after each batch, by all processes together; a process without a batch passes an empty one.

    Raises:
        Interrupted: `interrupted` returned True.
        RuntimeError: the number of examples seen is not `expected`.

    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
    local_batches = iter(batches)
    for _ in range(num_batches):
        if interrupted():
            model.train(was_training)
            raise Interrupted
        batch = next(local_batches, None)
        if batch is None:
            if record is not None:
                no_examples = torch.empty(0, dtype=torch.int64, device=device)
                record(torch.empty(0, classes, device=device), no_examples, no_examples)
            continue
        images, labels, examples = batch
        logits = model(normalize(images)).float()
        if record is not None:
            record(logits, labels, examples)
        loss_sum += cross_entropy(logits, labels, reduction="sum")
        predictions = logits.argmax(dim=1)
        # bincount and boolean indices would wait for the device to learn the size of their result.
        counts[0].scatter_add_(0, labels, (predictions == labels).long())
        counts[1].scatter_add_(0, labels, torch.ones_like(labels))
        counts[2].scatter_add_(0, predictions, torch.ones_like(predictions))
    model.train(was_training)
    total = reduce(torch.cat([loss_sum.view(1), counts.double().flatten()])).tolist()
    correct, support, predicted = (
        tuple(int(n) for n in total[1 + i * classes : 1 + (i + 1) * classes]) for i in range(3)
    )
    if sum(support) != expected:
        raise RuntimeError(f"evaluated {sum(support)} examples, expected {expected}")
    return Evaluation(total[0], correct, support, predicted)
