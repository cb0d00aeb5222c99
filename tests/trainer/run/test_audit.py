import errno
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from regraft.contract import AUDIT
from trainer.errors import UserError
from trainer.run.audit import with_audit

STEPS = 3
"""Updates of an epoch."""
Batch = tuple[Tensor, Tensor, Tensor]


def image(example: int) -> Tensor:
    generator = torch.Generator().manual_seed(example)
    return torch.randint(256, (3, 4, 5), dtype=torch.uint8, generator=generator)


def batches(*, start_step: int = 0, rank: int = 0, world_size: int = 1, size: int = 4) -> Iterator[Batch]:
    """Yield the local batches of six updates; the examples of an update are consecutive."""
    for step in range(start_step, 2 * STEPS):
        examples = range(size * step + rank, size * (step + 1), world_size)
        images = torch.stack([image(example) for example in examples]) if examples else torch.zeros(0, 3, 4, 5)
        if rank == 1:
            images = images.contiguous(memory_format=torch.channels_last)
        yield images, torch.zeros(len(examples)), torch.tensor(list(examples))


def audit(found: Iterator[Batch], folder: Path, **changes: int) -> Any:
    counts = {"start_step": 0, "steps_per_epoch": STEPS, "attempt": 1, "rank": 0, "world_size": 1, **changes}
    return with_audit(found, folder, lr_multiplier=lambda step: 1 / (1 + step), **counts)


def rows(folder: Path, rank: int = 0) -> list[dict[str, Any]]:
    lines = (folder / AUDIT / f"rank-{rank}.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("world_size", [1, 5])
def test_each_update_is_recorded_with_its_examples_and_pixels(world_size: int, tmp_path: Path) -> None:
    # In any memory layout; with five processes, rank 4 has no example.
    for rank in range(world_size):
        local = {"rank": rank, "world_size": world_size}
        for number, _ in enumerate(audit(batches(**local), tmp_path, **local), start=1):
            assert len(rows(tmp_path, rank)) == number, "before the update"
    for step in range(2 * STEPS):
        updates = [rows(tmp_path, rank)[step] for rank in range(world_size)]
        pairs = [pair for row in updates for pair in zip(row.pop("examples"), row.pop("pixels"), strict=True)]
        examples = range(4 * step, 4 * step + 4)
        crcs = [zlib.crc32(image(example).permute(1, 2, 0).contiguous().numpy()) for example in examples]
        assert sorted(pairs) == list(zip(examples, crcs, strict=True))
        position = {"attempt": 1, "epoch": step // STEPS, "step": step}
        assert updates == [{**position, "world_size": world_size, "lr_multiplier": 1 / (1 + step)}] * world_size


@pytest.mark.parametrize("cut", [1, 20])
def test_a_row_that_a_kill_has_cut_off_is_removed(cut: int, tmp_path: Path) -> None:
    updates = audit(batches(), tmp_path)
    for _ in range(4):
        next(updates)
    updates.close()
    before = rows(tmp_path)
    path = tmp_path / AUDIT / "rank-0.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    list(audit(batches(start_step=2), tmp_path, start_step=2, attempt=2))
    after = rows(tmp_path)
    assert after[:3] == before[:3]
    assert [(row["attempt"], row["step"]) for row in after[3:]] == [(2, 2), (2, 3), (2, 4), (2, 5)]


def test_a_file_that_cannot_be_written_is_a_user_error_and_others_are_not_changed(tmp_path: Path) -> None:
    def failing() -> Iterator[Batch]:
        yield next(batches())
        raise OSError(errno.EMFILE, "Too many open files")

    updates = audit(failing(), tmp_path)
    next(updates)
    with pytest.raises(OSError, match="Too many open files"):
        next(updates)
    updates = audit(batches(), tmp_path)
    next(updates)
    (tmp_path / AUDIT).rename(tmp_path / "away")
    with pytest.raises(UserError, match=rf"^{tmp_path / AUDIT} is gone: it was deleted or moved"):
        next(updates)
    (tmp_path / AUDIT).write_text("mine")
    with pytest.raises(UserError, match=r"run\.audit: .*rank-0\.jsonl cannot be written \(.*\): make room"):
        next(audit(batches(), tmp_path))
