import errno
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import image_folder
from trainer.data.augment import Preprocessing, train_transform
from trainer.data.loader import Batch, Collate, DistributedBatchSampler, EpochOrder, ImageDataset, SampleKey
from trainer.errors import UserError
from trainer.run.audit import AUDIT, with_audit

SIZE, STEPS = 8, 3
ORDER = EpochOrder(examples=11, batch_size=4, seed=1)
PREPROCESSING = Preprocessing(
    image_size=SIZE,
    resize_size=SIZE,
    resize="squash",
    interpolation="bilinear",
    mean=(0.5,) * 3,
    std=(0.5,) * 3,
)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> ImageDataset:
    root = image_folder(tmp_path_factory.mktemp("images"), {"": {"a": 11}})
    paths = [(str(path), 0) for path in sorted(root.rglob("*.png"))]
    return ImageDataset(paths, train_transform(PREPROCESSING, "recipe", (0.08, 1.0)), seed=1)


def batches(
    images: ImageDataset, *, rank: int = 0, world_size: int = 1, channels_last: bool = True, start: int = 0
) -> Iterator[Batch]:
    for draws in DistributedBatchSampler(ORDER, epochs=2, start_step=start, rank=rank, world_size=world_size):
        yield Collate(SIZE, channels_last)([images[draw] for draw in draws])


def audit(
    found: Iterator[Batch],
    folder: Path,
    *,
    start: int = 0,
    rank: int = 0,
    world_size: int = 1,
    attempt: int = 1,
) -> Iterator[Batch]:
    return with_audit(
        found,
        folder,
        start_step=start,
        steps_per_epoch=STEPS,
        rank=rank,
        world_size=world_size,
        attempt=attempt,
        lr_multiplier=lambda step: 1 / (1 + step),
    )


def rows(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    lines = (folder / AUDIT / f"rank-{rank}.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


def test_every_update_is_written_down_with_its_examples_and_their_pixels(
    images: ImageDataset, tmp_path: Path
) -> None:
    taken = list(audit(batches(images), tmp_path))
    found = rows(tmp_path)
    assert len(found) == len(taken) == 6
    for step, (row, batch) in enumerate(zip(found, taken, strict=True)):
        epoch, epoch_step = divmod(step, STEPS)
        examples = ORDER.batch(epoch, epoch_step)
        assert row == {
            "attempt": 1,
            "epoch": epoch,
            "step": step,
            "world": 1,
            "lr_factor": 1 / (1 + step),
            "examples": examples,
            "pixels": [zlib.crc32(images[SampleKey(epoch, example)][0].tobytes()) for example in examples],
        }
        assert batch.examples.tolist() == examples


def test_the_sums_do_not_depend_on_processes_or_memory_layout(images: ImageDataset, tmp_path: Path) -> None:
    for name in ("one", "three"):
        (tmp_path / name).mkdir()
    list(audit(batches(images), tmp_path / "one"))
    for rank in range(3):
        shares = batches(images, rank=rank, world_size=3, channels_last=False)
        list(audit(shares, tmp_path / "three", rank=rank, world_size=3))
    ranks = [rows(tmp_path / "three", rank) for rank in range(3)]
    for whole, *shares in zip(rows(tmp_path / "one"), *ranks, strict=True):
        together = [pair for row in shares for pair in zip(row["examples"], row["pixels"], strict=True)]
        assert sorted(together) == sorted(zip(whole["examples"], whole["pixels"], strict=True))
        assert {row["world"] for row in shares} == {3}


def test_an_empty_share_is_a_row_too(tmp_path: Path) -> None:
    list(audit(iter([Collate(SIZE, True)([])]), tmp_path, rank=2, world_size=3))
    (row,) = rows(tmp_path, 2)
    assert (row["examples"], row["pixels"]) == ([], [])


def test_a_row_is_written_before_its_update_is_made(images: ImageDataset, tmp_path: Path) -> None:
    taken = audit(batches(images), tmp_path)
    for number in (1, 2, 3):
        next(taken)
        assert len(rows(tmp_path)) == number


@pytest.mark.parametrize("cut", [1, 20])
def test_what_is_made_again_after_a_kill_stands_behind_whole_rows(
    cut: int, images: ImageDataset, tmp_path: Path
) -> None:
    taken = audit(batches(images), tmp_path)
    for _ in range(4):
        next(taken)
    taken.close()  # type: ignore[attr-defined]
    before = rows(tmp_path)
    file = tmp_path / AUDIT / "rank-0.jsonl"
    file.write_bytes(file.read_bytes()[:-cut])
    list(audit(batches(images, start=2), tmp_path, start=2, attempt=2))
    found = rows(tmp_path)
    assert found[:3] == before[:3]
    assert [(row["attempt"], row["step"]) for row in found[3:]] == [(2, 2), (2, 3), (2, 4), (2, 5)]
    assert {**found[3], "attempt": 1} == before[2], "the same update, from the same pixels"


def test_a_file_that_cannot_be_written_is_one_sentence(images: ImageDataset, tmp_path: Path) -> None:
    (tmp_path / AUDIT).write_text("mine")
    with pytest.raises(
        UserError, match=r"run\.audit: .*rank-0\.jsonl cannot be written \(.*\): make room, or leave it off"
    ):
        next(audit(batches(images), tmp_path))
    (tmp_path / AUDIT).unlink()
    taken = audit(batches(images), tmp_path)
    next(taken)
    (tmp_path / AUDIT).rename(tmp_path / "away")
    with pytest.raises(UserError, match=r"run\.audit: .* cannot be written \(No such file or directory\)"):
        next(taken)


def test_what_the_loader_meets_is_not_the_audits(tmp_path: Path) -> None:
    def failing() -> Iterator[Batch]:
        yield Batch(torch.zeros(1, 3, 2, 2, dtype=torch.uint8), torch.zeros(1), torch.zeros(1))
        raise OSError(errno.EMFILE, "Too many open files")

    taken = audit(failing(), tmp_path)
    next(taken)
    with pytest.raises(OSError, match="Too many open files"):
        next(taken)
