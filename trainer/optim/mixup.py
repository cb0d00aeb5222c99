"""Mixup and CutMix: each picture of a batch mixed with another one of the GLOBAL batch, and their labels alike.

What is mixed is drawn from (seed, step), over the positions of the global batch; rank r of w holds r, r + w, ...
of them (`data.loader.DistributedBatchSampler`). So an update is the same whatever the number of processes, and
after a resume.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.optim.loss import MixedTarget
from trainer.seeds import derive_seed


@dataclass(frozen=True, kw_only=True)
class MixParams:
    """How one global batch is mixed."""

    permutation: tuple[int, ...]
    """Position in the global batch -> that of the picture it is mixed with: a permutation; some may stay alone."""
    lam: float
    """Of the partner, 0 to 1; CutMix's is that of its box before it is cut off at the edges."""
    box: tuple[float, float, float, float] | None
    """CutMix: top, left, bottom, right of what comes from the partner, as shares of height and width; None: mixup."""


def sample_params(*, mixup: float, cutmix: float, seed: int, step: int, size: int) -> MixParams:
    """Return the mixture of the update `step` (of the run, from 0) on `size` examples.

    The weights come from Beta(alpha, alpha), one for the batch (Zhang et al. 2018); CutMix's box has its middle
    anywhere, and that weight as its area (Yun et al. 2019). With both, either comes as often as the other.

    Args:
        mixup: its alpha; 0: none.
        cutmix: its alpha; 0: none, but one of the two is above.
        seed: of the run.
        step: of the run.
        size: of the global batch.

    """
    random = np.random.default_rng(derive_seed("mixing", seed, step))
    is_cutmix = cutmix > 0 and (mixup == 0 or random.random() < 0.5)
    alpha = cutmix if is_cutmix else mixup
    weight = float(random.beta(alpha, alpha))
    middle = random.random(2)
    permutation = tuple(random.permutation(size).tolist())
    if not is_cutmix:
        return MixParams(permutation=permutation, lam=weight, box=None)
    half = math.sqrt(weight) / 2
    (top, left), (bottom, right) = (np.clip(middle + by, 0, 1).tolist() for by in (-half, half))
    return MixParams(permutation=permutation, lam=weight, box=(top, left, bottom, right))


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mixes the shares of one process with those of all."""

    mixup_alpha: float
    cutmix_alpha: float
    seed: int
    rank: int
    world_size: int
    gather: Callable[[Tensor], Tensor]
    """[n, ...] of each process -> [world * n, ...], in the order of the ranks; all of them call it."""

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, size: int
    ) -> tuple[Tensor, Tensor, MixedTarget]:
        """Mix this process's share of the update `step`, whose global batch has `size` examples.

        Returns:
            images [B, 3, H, W], uint8 after CutMix, float32 from 0 to 255 after mixup; the labels int64 [B] of the
            greater weight; and what is mixed into them.

        """
        mixture = sample_params(
            mixup=self.mixup_alpha, cutmix=self.cutmix_alpha, seed=self.seed, step=step, size=size
        )
        others, their_labels = self._partners(images, labels, mixture.permutation)
        if mixture.box is None:
            weight = mixture.lam
            mixed = torch.lerp(images.float(), others.float(), weight)
        else:
            mixed, weight = apply_cutmix(images, others, mixture.box)
        if weight > 0.5:  # the answer that counts is the greater part's
            return mixed, their_labels, MixedTarget(labels, 1 - weight)
        return mixed, labels, MixedTarget(their_labels, weight)

    def _partners(
        self, images: Tensor, labels: Tensor, permutation: tuple[int, ...]
    ) -> tuple[Tensor, Tensor]:
        """Return the pictures and labels that the share is mixed with, from whichever process holds them."""
        mine = permutation[self.rank :: self.world_size]
        if self.world_size > 1:
            longest = -(-len(permutation) // self.world_size)
            images, labels = (self.gather(_padded(tensor, longest)) for tensor in (images, labels))
            mine = tuple(other % self.world_size * longest + other // self.world_size for other in mine)
        index = torch.tensor(mine, dtype=torch.int64).to(labels.device, non_blocking=True)
        return images[index], labels[index]


def apply_cutmix(
    images: Tensor, others: Tensor, box: tuple[float, float, float, float]
) -> tuple[Tensor, float]:
    """Return `images` [B, 3, H, W] with the box of `others` in them, and the share of the area that it covers."""
    height, width = images.shape[-2:]
    top, bottom = (round(edge * height) for edge in (box[0], box[2]))
    left, right = (round(edge * width) for edge in (box[1], box[3]))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (height * width)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor [n, ...] filled up to [length, ...], since all processes give as much."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
