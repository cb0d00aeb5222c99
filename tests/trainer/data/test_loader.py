from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from torch.utils.data import DataLoader

from tests.folders import image_folder
from trainer.data.augment import Augmentation, EvalTransform, TrainTransform
from trainer.data.dataset import Batch, ImageDataset
from trainer.data.decode import decode
from trainer.data.index import Example
from trainer.data.loader import Collate, make_dataloader
from trainer.data.preprocessing import Preprocessing
from trainer.data.read_index import read_index
from trainer.data.sampler import DistributedBatchSampler, EpochOrder, EvalBatchSampler, SampleKey
from trainer.errors import UserError

EXAMPLES, BATCH_SIZE = 11, 4  # the last batch has 3 examples
ORDER = EpochOrder(examples=EXAMPLES, batch_size=BATCH_SIZE, seed=0)

Loader = Callable[..., DataLoader[Batch]]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Example]:
    root = image_folder(tmp_path_factory.mktemp("data"), {"train": {"a": 6, "b": 5}, "val": {"a": 1, "b": 1}})
    return read_index(root, val_fraction=0, test_fraction=0.2, seed=0, extensions=(".png",)).train


@pytest.fixture
def dataset(examples: Sequence[Example], preprocessing: Preprocessing) -> ImageDataset:
    return ImageDataset(examples, TrainTransform(preprocessing, "basic", (0.08, 1.0)), seed=5)


@pytest.fixture
def make_loader() -> Iterator[Loader]:
    """Return a function that makes a loader."""
    accelerator = Accelerator(cpu=True)

    def make(
        dataset: ImageDataset,
        sampler: DistributedBatchSampler | EvalBatchSampler,
        *,
        num_workers: int = 0,
        channels_last: bool = True,
    ) -> DataLoader[Batch]:
        return make_dataloader(
            dataset, sampler, image_size=16, channels_last=channels_last, num_workers=num_workers,
            accelerator=accelerator,
        )  # fmt: skip

    yield make
    AcceleratorState._reset_state()
    PartialState._reset_state()


# Dataset


def test_crop_depends_on_seed_epoch_and_sample_only(examples: Sequence[Example], dataset: ImageDataset) -> None:
    keys = [SampleKey(*key) for key in np.ndindex(2, EXAMPLES, 3)]
    first = {key: dataset[key][0] for key in keys}
    torch.manual_seed(99)
    assert all(np.array_equal(first[key], dataset[key][0]) for key in reversed(keys))
    assert len({image.tobytes() for image in first.values()}) == len(keys), "epochs and repeats differ"
    assert np.array_equal(first[SampleKey(1, 2)], dataset[SampleKey(1, 2, 0)][0])
    other = ImageDataset(examples, dataset.transform, seed=6)
    assert not any(np.array_equal(first[key], other[key][0]) for key in keys)
    assert [dataset[key][1:] for key in keys] == [(examples[k.example].label, k.example) for k in keys]
    assert len(dataset) == EXAMPLES
    twice = ImageDataset([examples[0]] * 2, dataset.transform, seed=0)
    assert not np.array_equal(twice[SampleKey(0, 0)][0], twice[SampleKey(0, 1)][0]), "equal images"


@pytest.mark.parametrize("augment", ["basic", "randaugment"])
def test_threads_do_not_change_the_items(
    augment: Augmentation, examples: Sequence[Example], preprocessing: Preprocessing
) -> None:
    keys = [SampleKey(1, example) for example in (4, 0, 7, 2, 2, 9, 5)]
    dataset = ImageDataset(examples, TrainTransform(preprocessing, augment, (0.08, 1.0)), seed=5)
    for threads in (2, 3, 20):
        threaded = ImageDataset(examples, dataset.transform, seed=dataset.seed, threads=threads)
        for one, other in zip(dataset.__getitems__(keys), threaded.__getitems__(keys), strict=True):
            assert np.array_equal(one[0], other[0])
            assert one[1:] == other[1:]
        assert threaded.__getitems__([]) == []


def test_images_come_from_the_reader(examples: Sequence[Example], dataset: ImageDataset) -> None:
    images = [np.full((9, 7, 3), example, dtype=np.uint8) for example in range(EXAMPLES)]
    cached = ImageDataset(examples, dataset.transform, seed=0, threads=2, reader=images.__getitem__)
    for image, _, example in cached.__getitems__([SampleKey(0, example) for example in range(EXAMPLES)]):
        assert (image == example).all()


@pytest.mark.parametrize(("num_workers", "threads"), [(0, 1), (0, 2), (1, 1)])
def test_missing_image_is_named_in_one_line(
    num_workers: int, threads: int, tmp_path: Path, preprocessing: Preprocessing, make_loader: Loader
) -> None:
    root = image_folder(tmp_path, {"train": {"a": 3, "b": 3}})
    images = [(str(path), 0) for path in sorted(root.rglob("*.png"))]
    missing = Path(images[4][0])
    missing.rename(missing.with_name("a\nnew name"))
    dataset = ImageDataset(images, EvalTransform(preprocessing), seed=0, threads=threads)
    with pytest.raises(UserError) as error:
        list(make_loader(dataset, EvalBatchSampler(6, batch_size=2), num_workers=num_workers))
    text = str(error.value)
    assert text.startswith(f"{missing}: this image cannot be read: no such file. ")
    assert text.endswith("the same command resumes from the last checkpoint")
    assert "Traceback" not in text
    assert "\n" not in text


# Batches


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_batch_contains_the_images_of_its_examples(
    memory_format: torch.memory_format, examples: Sequence[Example], preprocessing: Preprocessing, make_loader: Loader
) -> None:
    transform = EvalTransform(preprocessing)
    dataset, sampler = ImageDataset(examples, transform, seed=0), EvalBatchSampler(EXAMPLES, batch_size=BATCH_SIZE)
    loader = make_loader(dataset, sampler, channels_last=memory_format is torch.channels_last)
    assert [len(batch.labels) for batch in loader] == [4, 4, 3]
    for batch in loader:  # a second pass over the same loader
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.labels), 3, 16, 16)
        assert batch.images.is_contiguous(memory_format=memory_format)
        for image, label, example in zip(*batch, strict=True):
            path, expected = examples[int(example)]
            assert int(label) == expected
            assert np.array_equal(image.permute(1, 2, 0), transform(np.asarray(decode(path))))


def test_local_batch_may_be_empty(dataset: ImageDataset, make_loader: Loader) -> None:
    order = EpochOrder(examples=EXAMPLES, batch_size=5, seed=0)  # the last batch has 1 example
    batches = list(make_loader(dataset, DistributedBatchSampler(order, epochs=1, rank=2, world_size=3)))
    assert [len(batch.labels) for batch in batches] == [1, 1, 0]
    assert batches[-1].images.shape == (0, 3, 16, 16)
    assert (batches[-1].images.dtype, batches[-1].labels.dtype) == (torch.uint8, torch.int64)
    assert Collate(8, True)([]).images.shape == (0, 3, 8, 8)


def test_workers_do_not_change_the_batches(dataset: ImageDataset, make_loader: Loader) -> None:
    sampler = DistributedBatchSampler(ORDER, epochs=2, start_step=1)
    without, with_worker = (list(make_loader(dataset, sampler, num_workers=n)) for n in (0, 1))
    assert len(without) == len(with_worker) == 5
    for one, other in zip(without, with_worker, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        assert one.images.stride() == other.images.stride()


def test_accelerate_neither_shards_nor_pads(
    dataset: ImageDataset, make_loader: Loader, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler = DistributedBatchSampler(ORDER, epochs=2, rank=1, world_size=3)
    with monkeypatch.context() as patch:
        patch.setitem(PartialState._shared_state, "num_processes", 3)
        patch.setitem(PartialState._shared_state, "process_index", 1)
        assert (PartialState().num_processes, PartialState().process_index) == (3, 1)
        batches = list(make_loader(dataset, sampler))
    expected = [[key.example for key in keys] for keys in sampler]
    assert [batch.examples.tolist() for batch in batches] == expected
