"""`audit/rank-N.jsonl`: what each process saw in every update, to compare one run with another.

One JSON object an update: attempt, epoch and step (from 0), world, lr_factor, examples (positions in the list of
training examples) and for each of them the CRC-32 of its pixels as they are trained on (before mixup or CutMix).
After a kill, updates that were lost are made again: of a step's rows those of the latest attempt count.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.data.loader import Batch
from trainer.errors import UserError

AUDIT = "audit"
_LONGEST_ROW = 1 << 24
"""Bytes."""


def with_audit(
    batches: Iterable[Batch],
    folder: Path,
    *,
    start_step: int,
    steps_per_epoch: int,
    rank: int,
    world_size: int,
    attempt: int,
    lr_multiplier: Callable[[int], float],
) -> Iterator[Batch]:
    """Yield the shares of the updates from `start_step` on, writing each down as it is taken.

    Raises:
        UserError: it cannot be written.

    """
    path = folder / AUDIT / f"rank-{rank}.jsonl"
    with _said(path):
        path.parent.mkdir(exist_ok=True)
        _drop_half_a_row(path)
    for step, batch in enumerate(batches, start=start_step):
        pixels = batch[0].permute(0, 2, 3, 1).contiguous().cpu().numpy()
        row = {
            "attempt": attempt,
            "epoch": step // steps_per_epoch,
            "step": step,
            "world": world_size,
            "lr_factor": lr_multiplier(step),
            "examples": batch[2].tolist(),
            "pixels": [zlib.crc32(picture) for picture in pixels],
        }
        with _said(path), path.open("a", encoding="ascii") as file:
            file.write(json.dumps(row) + "\n")
        yield batch


def _drop_half_a_row(path: Path) -> None:
    """Remove what a kill has left of a last row that it cut off: the next one would be written behind it."""
    with path.open("ab+") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _LONGEST_ROW)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


@contextmanager
def _said(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"run.audit: {path} cannot be written ({error.strerror}): make room, or leave it off"
        ) from None
