"""Evaluate a model: loss, accuracy and counts per class. Every example is counted once, on any number of processes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


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
    def interval(self) -> tuple[float, float]:
        """Return the 95 % confidence interval of the accuracy."""
        return wilson_interval(sum(self.correct), self.seen)


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
            continue
        images, labels, _ = batch
        logits = model(normalize(images)).float()
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
