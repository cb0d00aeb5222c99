"""The loss that training differentiates: cross-entropy, smoothed, weighted by class, and of mixed labels.

Tests are always scored by plain cross-entropy (`evaluate`): a figure that options cannot move.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy


@dataclass(frozen=True, eq=False)
class MixedTarget:
    """The lesser part of what mixup or CutMix has mixed."""

    labels: Tensor
    """int64 [B]: the classes of the pictures of lesser weight."""
    lam: float
    """Of these, 0 to 0.5."""

    def __getitem__(self, piece: slice) -> "MixedTarget":
        """Return a piece of the share."""
        return MixedTarget(self.labels[piece], self.lam)


@dataclass(frozen=True, kw_only=True, eq=False)
class Criterion:
    """The loss of some examples, added up over them: what `mean` divides by is the global batch's business."""

    label_smoothing: float = 0.0
    """Share of each target that goes to all classes alike (Szegedy et al. 2016, section 7)."""
    class_weights: Tensor | None = None
    """float32 [C], on the device: the weight of an example's whole loss by its class; None: 1."""

    def __call__(self, logits: Tensor, labels: Tensor, blend: MixedTarget | None = None) -> Tensor:
        """Return the summed loss, a float32 scalar, of logits [B, C] under labels int64 [B].

        Mixed labels share it by their weights, as mixup has it (Zhang et al. 2018).
        """
        logits = logits.float()
        loss = self._of(logits, labels)
        if blend is None:
            return loss
        return (1 - blend.lam) * loss + blend.lam * self._of(logits, blend.labels)

    def _of(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return cross_entropy(logits, labels, reduction="sum", label_smoothing=self.label_smoothing)
        # Not cross_entropy's own weight: that one weighs the smoothed part by every class but the example's.
        each = cross_entropy(logits, labels, reduction="none", label_smoothing=self.label_smoothing)
        return (each * self.class_weights[labels]).sum()


CROSS_ENTROPY = Criterion()
"""Cross-entropy."""


def balanced_weights(counts: Sequence[int]) -> Tensor:
    """Return class -> N / (C * n_c), float32 [C], of the examples of each class in the training set.

    The classes then have the same say in the loss of an epoch, and the mean weight of its examples is 1, so that
    learning rates keep their meaning (King and Zeng 2001). A class without examples counts for nothing: not in C.
    """
    total, present = sum(counts), sum(count > 0 for count in counts)
    return torch.tensor([total / (present * count) if count else 0.0 for count in counts])
