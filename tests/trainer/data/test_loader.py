import multiprocessing
import subprocess
import sys
from collections.abc import Iterator, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from tests.folders import image_folder
from tests.launching import REPOSITORY
from trainer.data.augment import Preprocessing, eval_transform, train_transform
from trainer.data.decode import decode
from trainer.data.index import Example, read_index
from trainer.data.loader import (
    Batch,
    Collate,
    DistributedBatchSampler,
    EpochOrder,
    EvalBatchSampler,
    ImageDataset,
    ImageReadError,
    SampleKey,
    make_dataloader,
)
from trainer.distributed.signals import STOPPING
from trainer.errors import UserError

SMALL = Preprocessing(
    image_size=16,
    resize_size=18,
    resize="squash",
    interpolation="bilinear",
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
)
EXAMPLES, BATCH = 11, 4  # the last batch is ragged: 3


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> Sequence[Example]:
    root = image_folder(tmp_path_factory.mktemp("data"), {"train": {"a": 6, "b": 5}, "val": {"a": 1, "b": 1}})
    return read_index(root, val_fraction=0, test_fraction=0.2, seed=0, extensions=(".png",)).train


@pytest.fixture
def images(examples: Sequence[Example]) -> ImageDataset:
    return ImageDataset(examples, train_transform(SMALL, "basic", (0.08, 1.0)), seed=5)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state()
    PartialState._reset_state()


def batches(
    images: ImageDataset,
    sampler: DistributedBatchSampler | EvalBatchSampler,
    accelerator: Accelerator,
    *,
    workers: int = 0,
    channels_last: bool = True,
) -> list[Batch]:
    loader = make_dataloader(
        images, sampler, image_size=16, channels_last=channels_last, workers=workers, accelerator=accelerator
    )
    return list(loader)


# Which examples make which update


@pytest.mark.parametrize("count", [1, 4, 11, 12])
def test_an_epoch_is_a_permutation_cut_into_batches(count: int) -> None:
    order = EpochOrder(examples=count, batch_size=BATCH, seed=3)
    for epoch in range(3):
        drawn = [example for step in range(order.steps_per_epoch) for example in order.batch(epoch, step)]
        assert sorted(drawn) == list(range(count))
        assert drawn == order.permutation(epoch).tolist()
        sizes = [len(order.batch(epoch, step)) for step in range(order.steps_per_epoch)]
        assert order.batch_sizes == tuple(sizes)
    assert order.steps_per_epoch == len(order.batch_sizes) == -(-count // BATCH)


def test_the_order_changes_with_the_epoch_and_the_seed() -> None:
    orders = [
        EpochOrder(examples=50, batch_size=8, seed=seed).permutation(epoch).tolist()
        for seed in (0, 1)
        for epoch in (0, 1)
    ]
    assert len({tuple(order) for order in orders}) == 4
    torch.manual_seed(0)
    assert orders[0] == EpochOrder(examples=50, batch_size=8, seed=0).permutation(0).tolist()


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("count", [1, 7, 11, 12, 13])
def test_the_ranks_shares_of_a_step_are_the_global_batch(count: int, world_size: int) -> None:
    order, epochs = EpochOrder(examples=count, batch_size=BATCH, seed=3), 3
    ranks = [
        list(DistributedBatchSampler(order, epochs=epochs, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert {len(shares) for shares in ranks} == {order.steps_per_epoch * epochs}
    for number, shares in enumerate(zip(*ranks, strict=True)):
        epoch, step = divmod(number, order.steps_per_epoch)
        draws = [draw for share in shares for draw in share]
        assert {draw.epoch for draw in draws} == {epoch}
        assert sorted(draw.example for draw in draws) == sorted(order.batch(epoch, step))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
    for epoch in range(epochs):
        seen = [d.example for shares in ranks for share in shares for d in share if d.epoch == epoch]
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize("world_size", [1, 3])
def test_shares_go_on_from_any_step(world_size: int) -> None:
    order = EpochOrder(examples=EXAMPLES, batch_size=BATCH, seed=3)
    for rank in range(world_size):
        whole = list(DistributedBatchSampler(order, epochs=3, rank=rank, world_size=world_size))
        for start in range(len(whole) + 1):
            rest = DistributedBatchSampler(
                order, epochs=3, start_step=start, rank=rank, world_size=world_size
            )
            assert list(rest) == whole[start:]
            assert len(rest) == len(whole) - start


@pytest.mark.parametrize("world_size", range(1, 6))
@pytest.mark.parametrize("count", [1, 3, 11, 12])
def test_evaluation_sees_every_example_once(count: int, world_size: int) -> None:
    parts = [
        EvalBatchSampler(count, batch_size=2, rank=rank, world_size=world_size) for rank in range(world_size)
    ]
    seen = [draw for part in parts for batch in part for draw in batch]
    assert sorted(draw.example for draw in seen) == list(range(count))
    assert {draw.epoch for draw in seen} == {0}
    for part in parts:
        assert len(list(part)) == len(part)
        assert all(1 <= len(batch) <= 2 for batch in part)


# What an example looks like


def test_a_crop_depends_on_seed_epoch_and_example_alone(
    examples: Sequence[Example], images: ImageDataset
) -> None:
    transform = train_transform(SMALL, "basic", (0.08, 1.0))
    draws = [SampleKey(epoch, example) for epoch in (0, 1) for example in range(EXAMPLES)]
    first = {draw: images[draw][0] for draw in draws}
    torch.manual_seed(99)
    again = {draw: images[draw][0] for draw in reversed(draws)}
    assert all(np.array_equal(first[draw], again[draw]) for draw in draws)
    assert not any(np.array_equal(first[SampleKey(0, e)], first[SampleKey(1, e)]) for e in range(EXAMPLES))
    other = ImageDataset(examples, transform, seed=6)
    assert not any(np.array_equal(first[draw], other[draw][0]) for draw in draws)
    assert [images[draw][1:] for draw in draws] == [(examples[d.example].label, d.example) for d in draws]
    assert len(images) == EXAMPLES


def test_equal_pictures_are_cropped_apart(examples: Sequence[Example]) -> None:
    twice = ImageDataset([examples[0]] * 2, train_transform(SMALL, "basic", (0.08, 1.0)), seed=0)
    assert not np.array_equal(twice[SampleKey(0, 0)][0], twice[SampleKey(0, 1)][0])


# Batches


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_holds_the_pictures_of_its_examples(
    examples: Sequence[Example], accelerator: Accelerator, channels_last: bool
) -> None:
    transform = eval_transform(SMALL)
    found = batches(
        ImageDataset(examples, transform, seed=0),
        EvalBatchSampler(EXAMPLES, batch_size=BATCH),
        accelerator,
        channels_last=channels_last,
    )
    assert [len(batch.labels) for batch in found] == [4, 4, 3]
    for batch in found:
        assert batch.images.dtype == torch.uint8
        assert batch.images.shape == (len(batch.labels), 3, 16, 16)
        assert batch.images.is_contiguous(
            memory_format=torch.channels_last if channels_last else torch.contiguous_format
        )
        for image, label, example in zip(*batch, strict=True):
            path, expected = examples[int(example)]
            assert int(label) == expected
            assert np.array_equal(image.permute(1, 2, 0), transform(decode(path)))


def test_an_empty_share_is_a_batch_of_length_0(images: ImageDataset, accelerator: Accelerator) -> None:
    order = EpochOrder(examples=EXAMPLES, batch_size=5, seed=0)  # the last batch is one example
    found = batches(images, DistributedBatchSampler(order, epochs=1, rank=2, world_size=3), accelerator)
    assert [len(batch.labels) for batch in found] == [1, 1, 0]
    assert found[-1].images.shape == (0, 3, 16, 16)
    assert (found[-1].images.dtype, found[-1].labels.dtype) == (torch.uint8, torch.int64)
    assert Collate(8, True)([]).images.shape == (0, 3, 8, 8)


def test_workers_change_nothing(images: ImageDataset, accelerator: Accelerator) -> None:
    order = EpochOrder(examples=EXAMPLES, batch_size=BATCH, seed=0)

    def drawn(workers: int) -> list[Batch]:
        return batches(
            images, DistributedBatchSampler(order, epochs=2, start_step=1), accelerator, workers=workers
        )

    here, there = drawn(0), drawn(1)
    assert len(here) == len(there) == 5
    for one, other in zip(here, there, strict=True):
        for a, b in zip(one, other, strict=True):
            assert torch.equal(a, b)
        assert one.images.stride() == other.images.stride()


@pytest.mark.parametrize("threads", [2, 3, 20])
def test_threads_change_nothing(examples: Sequence[Example], images: ImageDataset, threads: int) -> None:
    threaded = ImageDataset(examples, images.transform, seed=images.seed, threads=threads)
    draws = [SampleKey(1, example) for example in (4, 0, 7, 2, 2, 9, 5)]
    for one, other in zip(images.__getitems__(draws), threaded.__getitems__(draws), strict=True):
        assert np.array_equal(one[0], other[0])
        assert one[1:] == other[1:]
    assert threaded.__getitems__([]) == []


def test_an_image_that_a_thread_cannot_read_is_named(tmp_path: Path) -> None:
    gone = ImageDataset([(str(tmp_path / "gone.jpg"), 0)] * 3, eval_transform(SMALL), seed=0, threads=2)
    with pytest.raises(ImageReadError, match=r"gone\.jpg: this image cannot be read: no such file"):
        gone.__getitems__([SampleKey(0, 0), SampleKey(0, 1)])


def test_accelerate_neither_shards_nor_pads(
    images: ImageDataset, accelerator: Accelerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a group of several processes too: each one's sampler has cut its shares already."""
    order = EpochOrder(examples=EXAMPLES, batch_size=BATCH, seed=0)
    shares = DistributedBatchSampler(order, epochs=2, rank=1, world_size=3)
    with monkeypatch.context() as patch:
        patch.setitem(PartialState._shared_state, "num_processes", 3)
        patch.setitem(PartialState._shared_state, "process_index", 1)
        assert (PartialState().num_processes, PartialState().process_index) == (3, 1)
        found = batches(images, shares, accelerator)
    assert [batch.examples.tolist() for batch in found] == [
        [draw.example for draw in share] for share in shares
    ]


def test_a_loader_may_be_run_through_again(images: ImageDataset, accelerator: Accelerator) -> None:
    loader = make_dataloader(
        images,
        EvalBatchSampler(EXAMPLES, batch_size=8),
        image_size=16,
        channels_last=True,
        workers=0,
        accelerator=accelerator,
    )
    assert [batch.examples.tolist() for batch in loader] == [batch.examples.tolist() for batch in loader]


# An image that is gone


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_vanishes_is_named_in_plain_words(
    tmp_path: Path, accelerator: Accelerator, workers: int
) -> None:
    root = image_folder(tmp_path, {"train": {"a": 3, "b": 3}, "val": {"a": 1, "b": 1}})
    listed = read_index(root, val_fraction=0, test_fraction=0.2, seed=0, extensions=(".png",)).train
    images = ImageDataset(listed, eval_transform(SMALL), seed=0)
    gone = Path(listed[4].path)
    gone.rename(gone.with_name("a\nnew name"))
    with pytest.raises(UserError) as caught:
        batches(images, EvalBatchSampler(6, batch_size=2), accelerator, workers=workers)
    text = str(caught.value)
    assert text.startswith(f"{gone}: this image cannot be read: no such file. ")
    assert text.endswith("the same command goes on from the last checkpoint")
    assert "Traceback" not in text
    assert "\n" not in text


def test_the_words_of_a_worker_are_found_in_its_traceback() -> None:
    text = "x.jpg: this image cannot be read: no such file."
    assert str(ImageReadError(text)) == text
    traceback = f"Traceback (most recent call last):\n  ...\ntrainer.data.loader.ImageGone: {text}\n"
    wrapped = f"Caught ImageGone in DataLoader worker process 0.\nOriginal {traceback}"
    assert str(ImageReadError(wrapped)) == text


# Workers and signals


def at_work(images: ImageDataset, accelerator: Accelerator) -> tuple[Iterator[Batch], BaseProcess]:
    """Return the batches of three epochs but for the first one, and the worker that loads them."""
    order = EpochOrder(examples=EXAMPLES, batch_size=1, seed=0)
    loader = make_dataloader(
        images,
        DistributedBatchSampler(order, epochs=3),
        image_size=16,
        channels_last=True,
        workers=1,
        accelerator=accelerator,
    )
    others = {child.pid for child in multiprocessing.active_children()}  # of tests before this one
    found = iter(loader)
    next(found)
    (worker,) = (child for child in multiprocessing.active_children() if child.pid not in others)
    return found, worker


def test_signals_that_reach_the_whole_group_do_not_stop_a_worker(
    images: ImageDataset, accelerator: Accelerator
) -> None:
    found, worker = at_work(images, accelerator)
    for number in STOPPING:
        subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(worker.pid)], check=True)
    assert sum(1 for _ in found) == 3 * EXAMPLES - 1  # a worker that is gone would be an error here


def test_a_worker_ends_when_its_trainer_tells_it(images: ImageDataset, accelerator: Accelerator) -> None:
    _batches, worker = at_work(images, accelerator)
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


PROGRAM = """
import sys
from accelerate import Accelerator
from trainer.data.augment import Preprocessing, eval_transform
from trainer.data.loader import Images, EpochOrder, DistributedBatchSampler, make_dataloader
how, path = sys.argv[1:]
half = (0.5, 0.5, 0.5)
small = Preprocessing(
    image_size=16, resize_size=18, resize="squash", interpolation="bilinear", mean=half, std=half
)
images = Images([(path, 0)] * 9, eval_transform(small), seed=0)
shares = DistributedBatchSampler(EpochOrder(examples=9, batch_size=1, seed=0), epochs=9)
loader = make_dataloader(images, shares, image_size=16, channels_last=True, workers=1, accelerator=Accelerator(cpu=True))
for batch in loader:
    print("a batch", flush=True)
    if how == "error":
        raise RuntimeError("half way")
    sys.exit(0)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("how", "code"), [("error", 1), ("exit", 0)])
def test_a_process_that_ends_half_way_does_not_wait_for_its_workers(
    how: str, code: int, images: ImageDataset
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, how, images.paths[0]],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (code, "a batch\n")
