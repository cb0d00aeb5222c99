"""Data loaders of images in the memory of a device. They send indices and parameters instead of pixels.

Training images are stored decoded and cropped on the device, with the draws of `TrainTransform`. Images without random
augmentation, as those of evaluation, are stored as the model sees them.
"""

from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from trainer.data.augment import TrainTransform
from trainer.data.dataset import Batch, ImageDataset
from trainer.data.device_images import CropParams, DeviceImages, allocate, crop_params, erase, to_device
from trainer.data.sampler import SampleKey
from trainer.data.workers import PREFETCH_FACTOR, init_worker


class ViewLoader:
    """Batches of images that are stored as the model sees them."""

    def __init__(
        self, views: Tensor, labels: Tensor, sampler: Iterable[Sequence[SampleKey]], *, channels_last: bool
    ) -> None:
        """Create the loader.

        Args:
            views: uint8 [N, S, S, 3].
            labels: int64 [N], on the same device.
            sampler: yields the local batches.
            channels_last: memory format of the batches.

        """
        self._views, self._labels, self._sampler, self._channels_last = views, labels, sampler, channels_last

    def __iter__(self) -> Iterator[Batch]:
        for keys in self._sampler:
            examples = to_device(torch.tensor([key.example for key in keys], dtype=torch.int64), self._views.device)
            yield _batch(self._views[examples], examples, self._labels, channels_last=self._channels_last)


class CropLoader:
    """Batches of random crops of images on a device."""

    def __init__(
        self,
        images: DeviceImages,
        labels: Tensor,
        params: Iterable[Tensor],
        transform: TrainTransform,
        *,
        channels_last: bool,
    ) -> None:
        """Create the loader.

        Args:
            images: the decoded images.
            labels: int64 [N], on the same device.
            params: `CropParams` of the local batches, int64 [B, 10].
            transform: the augmentation that the parameters are drawn for.
            channels_last: memory format of the batches.

        """
        self._images, self._labels, self._params, self._transform = images, labels, params, transform
        self._channels_last = channels_last

    def __iter__(self) -> Iterator[Batch]:
        preprocessing = self._transform.preprocessing
        for params in self._params:
            images = self._images.crop(params.numpy(), preprocessing.image_size, preprocessing.interpolation)
            if self._transform.random_erasing:
                images = erase(images, params, self._transform.mean)
            examples = to_device(params[:, 0].contiguous(), images.device)
            yield _batch(images, examples, self._labels, channels_last=self._channels_last)


class CropParamsDataset(Dataset[CropParams[int]]):
    """Draws the random crop of each sample."""

    def __init__(self, transform: TrainTransform, sizes: np.ndarray, *, seed: int) -> None:
        """Create the dataset; `sizes` are the height and width of each image, int64 [N, 2]."""
        self._transform, self._sizes, self._seed = transform, sizes, seed

    def __getitem__(self, key: SampleKey) -> CropParams[int]:
        """Return the parameters of a sample."""
        height, width = self._sizes[key.example].tolist()
        box, flipped, erased = self._transform.sample(height, width, key.generator(self._seed))
        return crop_params(key.example, box, flipped=flipped, erased=erased)


def make_device_loader(
    dataset: ImageDataset,
    sampler: Iterable[Sequence[SampleKey]],
    *,
    device: torch.device,
    channels_last: bool,
    num_workers: int,
    threads: int,
) -> ViewLoader | CropLoader:
    """Copy the images of a dataset to a device, and return the loader of their batches.

    Args:
        dataset: its transform is deterministic, or a `TrainTransform` without a policy.
        sampler: yields the local batches.
        device: stores the images.
        channels_last: memory format of the batches.
        num_workers: worker processes that draw the crops; one draws tens of thousands per second.
        threads: number of images that are read at once.

    Raises:
        UserError: the images do not fit into the free memory of the device.

    """
    labels = torch.from_numpy(dataset.labels).to(device)
    transform = dataset.transform
    if not isinstance(transform, TrainTransform) or transform.augment == "none":
        views = load_views(dataset, device, threads=threads)
        return ViewLoader(views, labels, sampler, channels_last=channels_last)
    images = DeviceImages.load(dataset.read, len(dataset), device, threads=threads)
    params: DataLoader[Any] = DataLoader(
        CropParamsDataset(transform, images.sizes, seed=dataset.seed),
        batch_sampler=sampler,  # type: ignore[arg-type]
        collate_fn=_stack,
        num_workers=num_workers,
        prefetch_factor=PREFETCH_FACTOR if num_workers else None,
        worker_init_fn=partial(init_worker, low_priority=device.type == "cpu"),
    )
    return CropLoader(images, labels, params, transform, channels_last=channels_last)


def load_views(dataset: ImageDataset, device: torch.device, *, threads: int) -> Tensor:
    """Return the images of a dataset whose transform is deterministic, as the model sees them: uint8 [N, S, S, 3].

    Raises:
        UserError: they do not fit into the free memory of the device.

    """
    first = torch.tensor(dataset[SampleKey(0, 0)][0])
    views = allocate(len(dataset), *first.shape, device=device)

    def write(example: int) -> None:
        views[example] = torch.tensor(dataset[SampleKey(0, example)][0])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(write, range(len(dataset))))
    return views


def _stack(params: list[CropParams[int]]) -> Tensor:
    return torch.tensor(params, dtype=torch.int64).view(len(params), len(CropParams._fields))


def _batch(images: Tensor, examples: Tensor, labels: Tensor, *, channels_last: bool) -> Batch:
    """Return a batch of images uint8 [B, S, S, 3]."""
    images = images.permute(0, 3, 1, 2)
    return Batch(images if channels_last else images.contiguous(), labels[examples], examples)
