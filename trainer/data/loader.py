"""Data loader: local batches on the device, prefetched by worker processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from trainer.data.dataset import Batch, ImageDataset, Item
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler
from trainer.data.workers import PREFETCH_FACTOR, init_worker
from trainer.text import escape_unprintable


@dataclass(frozen=True)
class Collate:
    """Stacks items into a batch. An empty list gives tensors of length 0."""

    image_size: int
    channels_last: bool

    def __call__(self, items: list[Item]) -> Batch:
        """Return a batch of (image uint8 [H, W, 3], label, example) items."""
        if items:
            stacked = torch.from_numpy(np.stack([image for image, _, _ in items]))
        else:
            stacked = torch.empty(0, self.image_size, self.image_size, 3, dtype=torch.uint8)
        labels = torch.tensor([label for _, label, _ in items], dtype=torch.int64)
        examples = torch.tensor([example for _, _, example in items], dtype=torch.int64)
        # Images are stored as [H, W, 3]; permuted to [3, H, W] they are in channels_last format already.
        images = stacked.permute(0, 3, 1, 2)
        return Batch(images if self.channels_last else images.contiguous(), labels, examples)


class TrainBatches:
    """Iterator over the local batches of a run, from one of its steps to the last epoch."""

    def __init__(self, batches: Iterator[Batch], dataset: ImageDataset, order: EpochOrder) -> None:
        self._batches, self._dataset, self._order = batches, dataset, order

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        return next(self._batches)

    def through(self, function: Callable[[Iterator[Batch]], Iterator[Batch]]) -> Self:
        """Return the batches with a function applied to their iterator."""
        return type(self)(function(self._batches), self._dataset, self._order)

    def paths(self, epoch: int, step: int) -> Sequence[str]:
        """Return the printable paths of a global batch; epoch and step within the epoch count from 0."""
        return [escape_unprintable(self._dataset.paths[example]) for example in self._order.batch(epoch, step)]


def make_dataloader(
    dataset: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    *,
    image_size: int,
    channels_last: bool,
    num_workers: int,
    accelerator: Accelerator,
) -> DataLoader[Batch]:
    """Return a loader whose batches arrive on the accelerator's device, prefetched by `num_workers` processes."""
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_sampler=sampler,
        collate_fn=Collate(image_size, channels_last),
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        persistent_workers=num_workers > 0,
        pin_memory=accelerator.device.type == "cuda",
        # On a CPU the workers share the cores with training. At low priority they use only idle time.
        worker_init_fn=partial(init_worker, low_priority=accelerator.device.type == "cpu"),
    )
    # The sampler already splits the batches among the ranks. With one process, accelerate moves batches to the device
    # and neither shards nor pads them.
    return prepare_data_loader(
        loader,
        device=accelerator.device,
        num_processes=1,
        process_index=0,
        put_on_device=True,
        rng_types=[],
        non_blocking=True,
    )
