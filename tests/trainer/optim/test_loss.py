from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from trainer.optim.loss import CROSS_ENTROPY, Criterion, MixedTarget, balanced_weights

CLASSES = 4
WEIGHTS = [0.5, 2.0, 1.0, 3.0]


def random_batch(size: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits that require a gradient, labels, and the labels they are mixed with."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(size, CLASSES, generator=generator).requires_grad_()
    labels, others = torch.randint(CLASSES, (2, size), generator=generator)
    return logits, labels, others


def test_without_options_it_is_cross_entropy_bit_for_bit() -> None:
    logits, labels, _ = random_batch()
    loss, expected = CROSS_ENTROPY(logits, labels), cross_entropy(logits, labels, reduction="sum")
    assert torch.equal(loss, expected)
    assert torch.equal(*(torch.autograd.grad(value, logits)[0] for value in (loss, expected)))


def reference_loss(logits: Tensor, labels: Tensor, smoothing: float, weights: Sequence[float]) -> float:
    """Return the summed loss, computed example by example."""
    total = 0.0
    for row, label in zip(log_softmax(logits.detach().double(), dim=1), labels.tolist(), strict=True):
        target = [smoothing / CLASSES + (1 - smoothing) * (c == label) for c in range(CLASSES)]
        total -= weights[label] * sum(t * p for t, p in zip(target, row.tolist(), strict=True))
    return total


@pytest.mark.parametrize(("smoothing", "weights"), [(0.0, WEIGHTS), (0.3, None), (0.3, WEIGHTS)])
def test_smoothing_class_weights_and_mixed_labels_against_a_reference(
    smoothing: float, weights: list[float] | None
) -> None:
    logits, labels, others = random_batch()
    class_weights = None if weights is None else torch.tensor(weights)
    criterion = Criterion(label_smoothing=smoothing, class_weights=class_weights)
    own, mixed_in = (reference_loss(logits, y, smoothing, weights or [1] * CLASSES) for y in (labels, others))
    assert criterion(logits, labels).item() == pytest.approx(own, rel=1e-5)
    mixed = criterion(logits, labels, MixedTarget(others, 0.3)).item()
    assert mixed == pytest.approx(0.7 * own + 0.3 * mixed_in, rel=1e-5)


def test_balanced_weights_give_every_class_the_same_gradient_and_have_a_mean_of_1() -> None:
    counts = [6, 3, 0, 1]
    weights = balanced_weights(counts)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    assert sum(n * w for n, w in zip(counts, weights.tolist(), strict=True)) == pytest.approx(sum(counts))
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    bias = torch.zeros(CLASSES, requires_grad=True)  # a model that knows only how frequent each class is
    logits = bias.expand(10, -1)
    (plain,) = torch.autograd.grad(CROSS_ENTROPY(logits, labels), bias)
    (balanced,) = torch.autograd.grad(Criterion(class_weights=weights)(logits, labels), bias)
    assert plain[0] < plain[1] < plain[3]
    torch.testing.assert_close(balanced[[0, 1, 3]], balanced[0].expand(3))
