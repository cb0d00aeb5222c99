"""Which examples make which update, and how they get to the device.

The order is a pure function of (seed, epoch); step s updates on `order[s * B : (s + 1) * B]` of its epoch,
whatever the number of processes: rank r of w takes every w-th of those. Nothing is padded or repeated (but by
balanced sampling, whose epochs are as long), so shares may be unequal, and empty at the ragged end of an epoch.
"""

import hashlib
import math
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.augment import Transform, apply_seeded, to_array
from trainer.data.balance import balanced, repeated
from trainer.data.decode import UnreadableImage, decode
from trainer.distributed.signals import STOPPING, end_with_parent
from trainer.errors import UserError
from trainer.seeds import derive_seed
from trainer.text import escape_unprintable


class ImageReadError(UserError):
    """An image that cannot be read now, though it could be when it was checked.

    torch makes a worker's exception anew in the trainer, of its type and the text of the worker's
    traceback; what a reader is told is the end of that text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


class SampleKey(NamedTuple):
    """One example as it is seen in one epoch."""

    epoch: int
    example: int
    repeat: int = 0
    """How often it was drawn in the epoch before: each time it is cropped anew."""


class Batch(NamedTuple):
    """One process's share of a global batch; B may be 0."""

    images: Tensor
    """uint8 [B, 3, H, W]."""
    labels: Tensor
    """int64 [B]."""
    examples: Tensor
    """int64 [B]: positions in the training (or test) list."""


class ImageDataset(Dataset[tuple[np.ndarray, int, int]]):
    """Decoded and transformed pictures; reading one is the only thing that a worker does."""

    def __init__(
        self, examples: Sequence[tuple[str, int]], transform: Transform, *, seed: int, threads: int = 1
    ) -> None:
        """Take (path, label) pairs; `threads` decode at a time, where no workers do."""
        self.paths = [path for path, _ in examples]
        self.labels = np.array([label for _, label in examples], dtype=np.int64)
        self.transform = transform
        self.seed = seed
        self.threads = threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, draw: SampleKey) -> tuple[np.ndarray, int, int]:
        """Return (uint8 [H, W, 3], label, example)."""
        return self._transformed(draw, self._decoded(draw))

    def __getitems__(self, draws: Sequence[SampleKey]) -> list[tuple[np.ndarray, int, int]]:
        """Return a whole share: torch's loader asks for it at once.

        Pillow lets other threads run while it decodes. The transforms draw from the process's one generator:
        they run in turn. No more pictures than threads lie decoded at once, since some are large.
        """
        if self.threads == 1:
            return [self[draw] for draw in draws]
        items: list[tuple[np.ndarray, int, int]] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(draws), self.threads):
                some = draws[start : start + self.threads]
                items += map(self._transformed, some, pool.map(self._decoded, some))
        return items

    def _decoded(self, draw: SampleKey) -> Image.Image:
        path = self.paths[draw.example]
        try:
            return decode(path)
        except UnreadableImage as error:
            raise ImageReadError(
                f"{escape_unprintable(path)}: this image cannot be read: {error}. If it could be when training began, "
                "it has changed since: bring it back, and the same command goes on from the last checkpoint"
            ) from None

    def _transformed(self, draw: SampleKey, image: Image.Image) -> tuple[np.ndarray, int, int]:
        place = (draw.epoch, draw.example, draw.repeat) if draw.repeat else (draw.epoch, draw.example)
        image = apply_seeded(self.transform, image, derive_seed("crop", self.seed, *place))
        return to_array(image), int(self.labels[draw.example]), draw.example


@dataclass(frozen=True, kw_only=True)
class EpochOrder:
    """The order of the training examples: (seed, epoch) -> as many draws as there are, cut into global batches."""

    examples: int
    batch_size: int
    seed: int
    labels: tuple[int, ...] | None = field(default=None, repr=False)
    """Of the examples: draw of each class equally many (`data.balance`); None: each example once."""

    @property
    def steps_per_epoch(self) -> int:
        """Return the number of updates of an epoch; the last batch may be ragged."""
        return -(-self.examples // self.batch_size)

    def permutation(self, epoch: int) -> Tensor:
        """Return the order of epoch `epoch` (counted from 0), int64 [examples]; balanced, some come several times."""
        generator = torch.Generator().manual_seed(derive_seed("order", self.seed, epoch))
        if self.labels is not None:
            return balanced(torch.tensor(self.labels), generator)
        return torch.randperm(self.examples, generator=generator)

    def batch(self, epoch: int, step: int) -> list[int]:
        """Return the examples of the global batch `step` (counted from 0) of that epoch."""
        return self.permutation(epoch)[step * self.batch_size : (step + 1) * self.batch_size].tolist()

    def digest(self, epoch: int) -> str:
        """Return the SHA-256 of an epoch's order: the same on every machine, or it is another order."""
        return hashlib.sha256(self.permutation(epoch).numpy().tobytes()).hexdigest()

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """Return the number of examples of each global batch of an epoch."""
        starts = range(0, self.examples, self.batch_size)
        return tuple(min(self.batch_size, self.examples - start) for start in starts)


class DistributedBatchSampler:
    """A batch sampler: one rank's shares from update `start_step` of the run to its end.

    It runs through the epochs without a stop, so that workers decode ahead while the test set is evaluated.
    """

    batch_size = 1  # accelerate reads it; the real sizes are those of the lists

    def __init__(
        self, order: EpochOrder, *, epochs: int, start_step: int = 0, rank: int = 0, world_size: int = 1
    ) -> None:
        self.order, self.epochs, self.start_step = order, epochs, start_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return self.order.steps_per_epoch * self.epochs - self.start_step

    def __iter__(self) -> Iterator[list[SampleKey]]:
        steps, size = self.order.steps_per_epoch, self.order.batch_size
        first_epoch, first_step = divmod(self.start_step, steps)
        for epoch in range(first_epoch, self.epochs):
            permutation = self.order.permutation(epoch)
            repeats = None if self.order.labels is None else repeated(permutation)
            for step in range(first_step if epoch == first_epoch else 0, steps):
                mine = slice(step * size + self.rank, (step + 1) * size, self.world_size)
                share = permutation[mine].tolist()
                times = [0] * len(share) if repeats is None else repeats[mine].tolist()
                yield [SampleKey(epoch, *draw) for draw in zip(share, times, strict=True)]


class EvalBatchSampler:
    """A batch sampler for evaluation: every world-th example, each once, in batches."""

    def __init__(self, examples: int, *, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.mine = range(rank, examples, world_size)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return math.ceil(len(self.mine) / self.batch_size)

    def __iter__(self) -> Iterator[list[SampleKey]]:
        for start in range(0, len(self.mine), self.batch_size):
            yield [SampleKey(0, example) for example in self.mine[start : start + self.batch_size]]


@dataclass(frozen=True)
class Collate:
    """Stack a share; an empty one becomes tensors of length 0."""

    image_size: int
    channels_last: bool

    def __call__(self, items: list[tuple[np.ndarray, int, int]]) -> Batch:
        """Return the batch of (uint8 [H, W, 3], label, example) items."""
        if items:
            stacked = torch.from_numpy(np.stack([image for image, _, _ in items]))
        else:
            stacked = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        labels = torch.tensor([label for _, label, _ in items], dtype=torch.int64)
        examples = torch.tensor([example for _, _, example in items], dtype=torch.int64)
        # Pictures lie in memory as [H, W, 3]: seen as [3, H, W], that already is channels_last.
        images = stacked.permute(0, 3, 1, 2)
        return Batch(images if self.channels_last else images.contiguous(), labels, examples)


def _start_worker(_: int, *, yields: bool) -> None:
    for number in STOPPING:  # these reach whole process groups; they are the trainer's to handle
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), daemon=True).start()
    end_with_parent(signal.SIGKILL)
    if yields:
        os.nice(19)


def _end_when_told(trainer: int) -> None:
    """Leave at a TERM of the trainer: at its own end Python ends, and waits for, what workers are left so."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def make_dataloader(
    images: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    *,
    image_size: int,
    channels_last: bool,
    workers: int,
    accelerator: Accelerator,
) -> DataLoader[Batch]:
    """Return a loader whose batches arrive on the accelerator's device, prefetched by `workers` processes."""
    loader: DataLoader[Any] = DataLoader(
        images,
        batch_sampler=sampler,
        collate_fn=Collate(image_size, channels_last),
        num_workers=workers,
        prefetch_factor=4 if workers else None,
        persistent_workers=workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        # On a CPU the workers share the cores with the training: niced, they use what it leaves idle.
        worker_init_fn=partial(_start_worker, yields=accelerator.device.type == "cpu"),
    )
    # Shares are cut by our sampler: accelerate is told of one process, so that it places batches on the
    # device and neither shards nor pads.
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        rng_types=[],
        non_blocking=True,
    )
