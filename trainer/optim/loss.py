"""The training loss: cross-entropy with label smoothing, class weights and mixed labels.

Evaluation always uses plain cross-entropy, so that its loss can be compared between runs with different options.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, eq=False)
class MixedTarget:
    """The labels of the lesser weight, after mixup or CutMix."""

    labels: Tensor
    """int64 [B]: labels of the images of the lesser weight."""
    lam: float
    """Weight of these labels, 0 to 0.5."""

    def __getitem__(self, micro_batch: slice) -> "MixedTarget":
        """Return the target of a micro-batch."""
        return MixedTarget(self.labels[micro_batch], self.lam)


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion:
    """Cross-entropy, summed over the examples. The caller divides by the size of the global batch."""

    label_smoothing: float = 0.0
    """Fraction of each target that is spread evenly over all classes (Szegedy et al. 2016, section 7)."""
    class_weights: Tensor | None = None
    """float32 [C], on the device: class -> factor of the loss of its examples; None: 1 for all."""

    def __call__(self, logits: Tensor, labels: Tensor, mixed: MixedTarget | None = None) -> Tensor:
        """Return the summed loss of logits [B, C] and labels int64 [B], a float32 scalar.

        With mixed labels it is the weighted mean of both losses, as in mixup (Zhang et al. 2018).
        """
        logits = logits.float()
        loss = self._cross_entropy(logits, labels)
        if mixed is None:
            return loss
        return (1 - mixed.lam) * loss + mixed.lam * self._cross_entropy(logits, mixed.labels)

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        # torch's own `weight` would weight the smoothed part of the target by the other classes' weights.
        losses = cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (losses * self.class_weights[labels]).sum()


CROSS_ENTROPY = Criterion()
"""Plain cross-entropy, without options."""


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Return class weights N / (C * n_c), float32 [C], from the number of training examples of each class.

    Every class then contributes equally to the loss of an epoch, and the mean weight of an example is 1, so learning
    rates need no change (King and Zeng 2001). Classes without examples have weight 0 and do not count in C.
    """
    total, present = sum(counts), sum(count > 0 for count in counts)
    return torch.tensor([total / (present * count) if count else 0.0 for count in counts])
