import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, log_softmax
from torchvision.models import GoogLeNetOutputs

from trainer.distributed import context
from trainer.loop import backward
from trainer.optim.loss import PLAIN, Criterion, MixedTarget, balanced_weights

CLASSES = 4


def drawn(size: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits that want a gradient, labels, and others."""
    generator = torch.Generator().manual_seed(7)
    logits = torch.randn(size, CLASSES, generator=generator).requires_grad_()
    labels, others = torch.randint(CLASSES, (2, size), generator=generator)
    return logits, labels, others


def test_with_all_options_off_it_is_cross_entropy_bit_for_bit() -> None:
    logits, labels, _ = drawn()
    (ours,) = torch.autograd.grad(PLAIN(logits, labels), logits)
    (theirs,) = torch.autograd.grad(cross_entropy(logits, labels, reduction="sum"), logits)
    assert torch.equal(PLAIN(logits, labels), cross_entropy(logits, labels, reduction="sum"))
    assert torch.equal(ours, theirs)


def by_hand(logits: Tensor, labels: Tensor, smoothing: float, weights: Any) -> float:
    """Return the summed loss, spelt out example by example."""
    total = 0.0
    for row, label in zip(log_softmax(logits.detach().double(), dim=1), labels.tolist(), strict=True):
        target = [smoothing / CLASSES + (1 - smoothing) * (c == label) for c in range(CLASSES)]
        total -= float(weights[label]) * sum(t * p for t, p in zip(target, row.tolist(), strict=True))
    return total


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
@pytest.mark.parametrize("weights", [None, [0.5, 2.0, 1.0, 3.0]])
def test_the_loss_is_that_of_smoothed_targets_times_the_weight_of_the_examples_class(
    smoothing: float, weights: list[float] | None
) -> None:
    logits, labels, others = drawn()
    criterion = Criterion(
        label_smoothing=smoothing, class_weights=None if weights is None else torch.tensor(weights)
    )
    expected = [by_hand(logits, wanted, smoothing, weights or [1] * CLASSES) for wanted in (labels, others)]
    assert criterion(logits, labels).item() == pytest.approx(expected[0], rel=1e-5)
    mixed = criterion(logits, labels, MixedTarget(others, 0.3)).item()
    assert mixed == pytest.approx(0.7 * expected[0] + 0.3 * expected[1], rel=1e-5)


def test_a_smoothed_target_is_reached_at_a_finite_logit_and_a_plain_one_never() -> None:
    share = 0.2
    right = math.log((1 - share + share / CLASSES) / (share / CLASSES))
    logits = torch.tensor([[right, 0.0, 0.0, 0.0]], requires_grad=True)
    label = torch.tensor([0])
    (gradient,) = torch.autograd.grad(Criterion(label_smoothing=share)(logits, label), logits)
    assert gradient.abs().max() < 1e-6
    (gradient,) = torch.autograd.grad(PLAIN(logits, label), logits)
    assert gradient[0, 0] < -0.1


def test_balanced_classes_pull_alike_and_the_mean_weight_of_the_examples_is_1() -> None:
    counts = [6, 3, 0, 1]
    weights = balanced_weights(counts)
    assert weights.tolist() == pytest.approx([10 / 18, 10 / 9, 0, 10 / 3])
    assert sum(n * w for n, w in zip(counts, weights.tolist(), strict=True)) == pytest.approx(sum(counts))
    labels = torch.tensor([0] * 6 + [1] * 3 + [3])
    bias = torch.zeros(
        CLASSES, requires_grad=True
    )  # a model that knows nothing but how often each class comes
    (plain,) = torch.autograd.grad(PLAIN(bias.expand(10, -1), labels), bias)
    (balanced,) = torch.autograd.grad(Criterion(class_weights=weights)(bias.expand(10, -1), labels), bias)
    assert plain[0] < plain[1] < plain[3]
    torch.testing.assert_close(balanced[[0, 1, 3]], balanced[0].expand(3))


class Auxiliary(nn.Module):
    """Outputs as GoogLeNet's, of three layers apart."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.first, self.second = (nn.Linear(12, CLASSES) for _ in range(3))

    def forward(self, images: Tensor) -> GoogLeNetOutputs:
        flat = images.flatten(1)
        return GoogLeNetOutputs(self.main(flat), self.second(flat), self.first(flat))


def test_auxiliary_outputs_have_the_same_loss_and_the_main_ones_is_reported() -> None:
    _, labels, others = drawn(5)
    images = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(2))
    criterion = Criterion(label_smoothing=0.2, class_weights=torch.tensor([0.5, 2.0, 1.0, 3.0]))
    torch.manual_seed(0)
    model = Auxiliary()
    accelerator = context.start(device="cpu", precision="fp32", threads=1).accelerator
    loss_sum, correct = backward(
        model, (images, labels, labels), 1.0, accelerator=accelerator, normalize=lambda images: images,
        parts=2, criterion=criterion, blend=MixedTarget(others, 0.4),
    )  # fmt: skip
    flat = images.flatten(1)
    for layer, weight in ((model.main, 1.0), (model.first, 0.3), (model.second, 0.3)):
        loss = criterion(layer(flat), labels, MixedTarget(others, 0.4))
        (expected,) = torch.autograd.grad(weight * loss, layer.weight)
        torch.testing.assert_close(layer.weight.grad, expected)
        if layer is model.main:
            assert loss_sum.item() == pytest.approx(loss.item())
            assert correct.item() == (layer(flat).argmax(1) == labels).sum().item()
