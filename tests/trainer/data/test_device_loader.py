from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.folders import noise_image
from trainer.data.augment import Augmentation, EvalTransform, TrainTransform, Transform
from trainer.data.dataset import Batch, ImageDataset
from trainer.data.device_loader import make_device_loader
from trainer.data.loader import Collate
from trainer.data.preprocessing import Preprocessing
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
COUNT = 7
IMAGES = [np.asarray(noise_image(number, size=(30 + 9 * number, 70 - 8 * number))) for number in range(COUNT)]
ORDER = EpochOrder(examples=COUNT, batch_size=4, seed=0)  # the last batch has 3 examples


def image_dataset(transform: Transform) -> ImageDataset:
    examples = [(f"{number}.png", number % 3) for number in range(COUNT)]
    return ImageDataset(examples, transform, seed=5, reader=IMAGES.__getitem__)


def device_batches(
    dataset: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    *,
    channels_last: bool = True,
    num_workers: int = 0,
) -> list[Batch]:
    loader = make_device_loader(
        dataset, sampler, device=DEVICE, channels_last=channels_last, num_workers=num_workers, threads=2
    )
    batches = list(loader)
    for first, second in zip(batches, loader, strict=True):  # a second pass over the same loader
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(tensor.device.type == DEVICE.type for batch in batches for tensor in batch)
    return [Batch(*(tensor.cpu() for tensor in batch)) for batch in batches]


def host_batches(dataset: ImageDataset, sampler: DistributedBatchSampler | EvalBatchSampler) -> Sequence[Batch]:
    return [Collate(16, channels_last=True)(dataset.__getitems__(keys)) for keys in sampler]


@pytest.mark.parametrize(("augment", "random_erasing"), [("basic", 0.0), ("basic", 0.7), ("none", 0.0)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_batches_on_a_device_are_those_of_the_host_within_2_gray_levels(
    augment: Augmentation, random_erasing: float, interpolation: str, preprocessing: Preprocessing
) -> None:
    preprocessing = replace(preprocessing, interpolation=interpolation)  # type: ignore[arg-type]
    transform = TrainTransform(preprocessing, augment, (0.08, 1.0), random_erasing=random_erasing)
    for rank, channels_last, num_workers in ((0, True, 1), (2, False, 0)):
        sampler = DistributedBatchSampler(ORDER, epochs=2, start_step=1, rank=rank, world_size=4)
        batches = device_batches(
            image_dataset(transform), sampler, channels_last=channels_last, num_workers=num_workers
        )
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        for batch, expected in zip(batches, host_batches(image_dataset(transform), sampler), strict=True):
            assert torch.equal(batch.labels, expected.labels)
            assert torch.equal(batch.examples, expected.examples)
            assert batch.images.dtype == torch.uint8
            assert batch.images.shape == expected.images.shape
            assert batch.images.is_contiguous(memory_format=memory_format)
            assert not batch.images.numel() or (batch.images.int() - expected.images.int()).abs().max() <= 2


def test_evaluation_batches_on_a_device_are_exactly_those_of_the_host(preprocessing: Preprocessing) -> None:
    dataset, sampler = image_dataset(EvalTransform(preprocessing)), EvalBatchSampler(COUNT, batch_size=3)
    for batch, expected in zip(device_batches(dataset, sampler), host_batches(dataset, sampler), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, expected, strict=True))
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
