"""Samplers: the examples of each global batch, and the local batches of each rank.

The order of an epoch is a pure function of (seed, epoch). Step s updates on `order[s * B : (s + 1) * B]` for any number
of processes: rank r of w takes every w-th of these examples, from the r-th on. Nothing is padded. Only balanced
sampling repeats examples, within an epoch of the same length. Local batches may therefore differ in size, and may be
empty in the last step of an epoch.
"""

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from trainer.data.balance import balanced, repeated
from trainer.seeds import derive_seed


class SampleKey(NamedTuple):
    """Key of a sample: with the seed of the run, it determines the augmentation."""

    epoch: int
    example: int
    repeat: int = 0
    """Number of earlier occurrences in the epoch (balanced sampling); each one is augmented differently."""

    def generator(self, seed: int) -> torch.Generator:
        """Return a new generator for the augmentation; `seed` is that of the run."""
        numbers = (self.epoch, self.example, self.repeat) if self.repeat else (self.epoch, self.example)
        return torch.Generator().manual_seed(derive_seed("crop", seed, *numbers))


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """Order of the training examples in each epoch, and its global batches."""

    examples: int
    """Number of training examples."""
    batch_size: int
    """Size of the global batch."""
    seed: int
    """Seed of the run."""
    labels: tuple[int, ...] | None = field(default=None, repr=False)
    """Labels of the examples for balanced sampling; None for each example once per epoch."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of updates per epoch; the last batch may be smaller."""
        return -(-self.examples // self.batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of an epoch, counted from 0: int64 [examples]. Balanced sampling repeats some examples."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        if self.labels is not None:
            return balanced(torch.tensor(self.labels), generator)
        return torch.randperm(self.examples, generator=generator)

    def batch(self, epoch: int, step: int) -> list[int]:
        """Return the examples of a global batch; epoch and step within the epoch count from 0."""
        return self.permutation(epoch)[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def digest(self, epoch: int) -> str:
        """Return the SHA-256 of the order of an epoch."""
        return hashlib.sha256(self.permutation(epoch).numpy().tobytes()).hexdigest()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Return the number of examples of each global batch of an epoch."""
        starts = range(0, self.examples, self.batch_size)
        return tuple(min(self.batch_size, self.examples - start) for start in starts)


class DistributedBatchSampler:
    """Local batches of one rank, from step `start_step` of the run to its end.

    It iterates over all epochs, so that workers prefetch the next epoch while the model is evaluated. With `views`,
    epoch e augments each example as epoch e mod `views`, every time that it occurs.
    """

    batch_size = 1  # accelerate reads this attribute; the lists have the real sizes

    def __init__(
        self,
        order: EpochOrder,
        *,
        epochs: int,
        start_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
        views: int | None = None,
    ) -> None:
        self.order, self.epochs, self.start_step = order, epochs, start_step
        self.rank, self.world_size, self.views = rank, world_size, views

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.epochs - self.start_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps, size = self.order.steps_per_epoch, self.order.batch_size
        first_epoch, first_step = divmod(self.start_step, steps)
        for epoch in range(first_epoch, self.epochs):
            permutation = self.order.permutation(epoch)
            repeats = None if self.order.labels is None else repeated(permutation)
            for step in range(first_step if epoch == first_epoch else 0, steps):
                local = slice(step * size + self.rank, (step + 1) * size, self.world_size)
                examples = permutation[local].tolist()
                if self.views is not None:
                    yield [SampleKey(epoch % self.views, example) for example in examples]
                    continue
                times = [0] * len(examples) if repeats is None else repeats[local].tolist()
                yield [SampleKey(epoch, *sample) for sample in zip(examples, times, strict=True)]


class EvalBatchSampler:
    """Batches of one rank for one pass over a split: every world_size-th example, each once.

    `view` is the epoch whose augmentation a random transform takes.
    """

    def __init__(self, examples: int, *, batch_size: int, rank: int = 0, world_size: int = 1, view: int = 0) -> None:
        self.local = range(rank, examples, world_size)
        self.batch_size, self.view = batch_size, view

    def __len__(self) -> int:
        return math.ceil(len(self.local) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.local), self.batch_size):
            yield [SampleKey(self.view, example) for example in self.local[start : start + self.batch_size]]
