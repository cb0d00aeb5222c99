"""Mixup and CutMix: mix each image with another image of the global batch, and their labels in the same ratio.

The parameters are drawn from (seed, step) for the whole global batch, so an update is the same on any number of
processes and after a resume. Rank r of w holds the positions r, r + w, ... of the global batch
(`data.sampler.DistributedBatchSampler`).
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
    """Position in the global batch -> position of the image it is mixed with, which may be the same."""
    lam: float
    """Weight of the other image, 0 to 1. For CutMix, the area of the box before it is clipped to the image."""
    box: tuple[float, float, float, float] | None
    """CutMix: top, left, bottom, right of the pasted box, as fractions of height and width. None for mixup."""


def sample_params(*, mixup_alpha: float, cutmix_alpha: float, seed: int, step: int, size: int) -> MixParams:
    """Return the parameters of one update.

    The weight is drawn from Beta(alpha, alpha), once per batch (Zhang et al. 2018). CutMix draws the center of its box
    uniformly and uses the weight as its area (Yun et al. 2019). If both are on, each has probability 1/2.

    Args:
        mixup_alpha: alpha of mixup; 0 turns mixup off.
        cutmix_alpha: alpha of CutMix; 0 turns CutMix off. One of the two must be above 0.
        seed: the run's seed.
        step: the update, counted from 0 over the run.
        size: number of examples of the global batch.

    """
    random = np.random.default_rng(derive_seed("mixing", seed, step))
    is_cutmix = cutmix_alpha > 0 and (mixup_alpha == 0 or random.random() < 0.5)
    alpha = cutmix_alpha if is_cutmix else mixup_alpha
    lam = float(random.beta(alpha, alpha))
    center = random.random(2)
    permutation = tuple(random.permutation(size).tolist())
    if not is_cutmix:
        return MixParams(permutation=permutation, lam=lam, box=None)
    half = math.sqrt(lam) / 2
    (top, left), (bottom, right) = (np.clip(center + by, 0, 1).tolist() for by in (-half, half))
    return MixParams(permutation=permutation, lam=lam, box=(top, left, bottom, right))


@dataclass(frozen=True, kw_only=True)
class Mixup:
    """Mixes one process's local batch with images of all processes."""

    mixup_alpha: float
    cutmix_alpha: float
    seed: int
    rank: int
    world_size: int
    gather: Callable[[Tensor], Tensor]
    """Concatenates [n, ...] of each process in rank order to [world_size * n, ...]. Every process must call it."""

    @property
    def enabled(self) -> bool:
        """Return whether mixup or CutMix is on."""
        return self.mixup_alpha > 0 or self.cutmix_alpha > 0

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, size: int
    ) -> tuple[Tensor, Tensor, MixedTarget | None]:
        """Mix the local batch of update `step`, whose global batch has `size` examples. Every process must call it.

        Returns:
            Images [B, 3, H, W]: uint8 after CutMix, float32 in 0 to 255 after mixup. Labels int64 [B] of the greater
            weight. The target of the lesser weight. If both are off: images and labels unchanged, and None.

        """
        if not self.enabled:
            return images, labels, None
        params = sample_params(
            mixup_alpha=self.mixup_alpha, cutmix_alpha=self.cutmix_alpha, seed=self.seed, step=step, size=size
        )
        others, other_labels = self._permuted(images, labels, params.permutation)
        if params.box is None:
            lam = params.lam
            mixed = torch.lerp(images.float(), others.float(), lam)
        else:
            mixed, lam = apply_cutmix(images, others, params.box)
        if lam > 0.5:  # accuracy counts the label of the greater weight
            return mixed, other_labels, MixedTarget(labels, 1 - lam)
        return mixed, labels, MixedTarget(other_labels, lam)

    def _permuted(self, images: Tensor, labels: Tensor, permutation: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Return the images and labels that the local batch is mixed with, from whichever process holds them."""
        local = permutation[self.rank :: self.world_size]
        if self.world_size > 1:
            longest = -(-len(permutation) // self.world_size)
            images, labels = (self.gather(_padded(tensor, longest)) for tensor in (images, labels))
            local = tuple(other % self.world_size * longest + other // self.world_size for other in local)
        index = torch.tensor(local, dtype=torch.int64).to(labels.device, non_blocking=True)
        return images[index], labels[index]


def apply_cutmix(images: Tensor, others: Tensor, box: tuple[float, float, float, float]) -> tuple[Tensor, float]:
    """Return `images` [B, 3, H, W] with the box of `others` pasted in, and the fraction of the area it covers."""
    height, width = images.shape[-2:]
    top, bottom = (round(edge * height) for edge in (box[0], box[2]))
    left, right = (round(edge * width) for edge in (box[1], box[3]))
    mixed = images.clone()
    mixed[..., top:bottom, left:right] = others[..., top:bottom, left:right]
    return mixed, (bottom - top) * (right - left) / (height * width)


def _padded(tensor: Tensor, length: int) -> Tensor:
    """Return a tensor [n, ...] padded with zeros to [length, ...], since a gather needs equal sizes."""
    return torch.cat([tensor, tensor.new_zeros(length - len(tensor), *tensor.shape[1:])])
