"""Sums over a test set -> metrics. Every example is counted once, whatever the number of processes."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy


@dataclass(frozen=True)
class Evaluation:
    """What a pass over a test set found; counts are per class, in the order of the classes."""

    loss_sum: float
    correct: tuple[int, ...]
    support: tuple[int, ...]
    """Examples of each class."""
    predicted: tuple[int, ...]
    """How often each class was the answer."""

    @property
    def seen(self) -> int:
        """Return the number of examples evaluated."""
        return sum(self.support)

    @property
    def accuracy(self) -> float:
        """Return the share of right answers."""
        return sum(self.correct) / self.seen

    @property
    def loss(self) -> float:
        """Return the mean cross-entropy."""
        return self.loss_sum / self.seen

    @property
    def interval(self) -> tuple[float, float]:
        """Return the 95 % interval of the accuracy."""
        return wilson_interval(sum(self.correct), self.seen)


Evaluations = dict[str, Evaluation]
"""Split (`test`, `val`) -> its evaluation."""


class Interrupted(Exception):
    """The evaluation was asked to end before its time."""


def wilson_interval(successes: int, trials: int, z: float = 1.959963984540054) -> tuple[float, float]:
    """Return the score interval of a proportion (Wilson 1927); z = 1.96 covers 95 %.

    Unlike the normal approximation it stays within [0, 1] and is not empty at 0 or `trials` successes.
    """
    share = successes / trials
    scale = 1 + z * z / trials
    centre = (share + z * z / (2 * trials)) / scale
    half = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials)) / scale
    return max(0.0, centre - half), min(1.0, centre + half)


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
        model: not wrapped for distribution, so that unequal shares need no partner; left in its mode.
        batches: (images uint8 [B, 3, H, W], labels int64 [B], examples int64 [B]) of this process.
        classes: number of classes, C.
        expected: number of examples that all processes together must have seen.
        normalise: uint8 images -> the model's input.
        reduce: adds a float64 tensor over all processes.
        device: where sums are kept; they are read once, at the end.
        rounds: batches of the process that has most of them.
        interrupted: asked before each round, by all processes together: whether to end here.

    Raises:
        Interrupted: all processes were asked to end; the model is as it was.
        RuntimeError: another number of examples was seen than expected.

    """
    was_training = model.training
    model.eval()
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    counts = torch.zeros(3, classes, dtype=torch.int64, device=device)
    mine = iter(batches)
    for _ in range(num_batches):
        if interrupted():
            model.train(was_training)
            raise Interrupted
        batch = next(mine, None)
        if batch is None:
            continue
        images, labels, _ = batch
        logits = model(normalize(images)).float()
        loss_sum += cross_entropy(logits, labels, reduction="sum")
        answers = logits.argmax(dim=1)
        # bincount and boolean indices would wait for the device, to learn how long their result is
        counts[0].scatter_add_(0, labels, (answers == labels).long())
        counts[1].scatter_add_(0, labels, torch.ones_like(labels))
        counts[2].scatter_add_(0, answers, torch.ones_like(answers))
    model.train(was_training)
    total = reduce(torch.cat([loss_sum.view(1), counts.double().flatten()])).tolist()
    correct, support, predicted = (
        tuple(int(n) for n in total[1 + i * classes : 1 + (i + 1) * classes]) for i in range(3)
    )
    if sum(support) != expected:
        raise RuntimeError(f"evaluated {sum(support)} examples, expected {expected}")
    return Evaluation(total[0], correct, support, predicted)
