"""Record in `audit/rank-N.jsonl` what each process trained on in every update, to compare runs.

One JSON object per update: attempt, epoch and step (from 0), world_size, lr_multiplier, examples (positions in the
list of training examples) and the CRC-32 of each example's pixels as they are trained on (before mixup or CutMix), or
of its features, where the output of frozen layers is computed once (`train.cache_features`).
A resumed run repeats the updates that a kill has undone: of the rows of one step, the latest attempt's counts.
"""

import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from regraft.contract import AUDIT
from trainer.errors import UserError
from trainer.run.atomic import describe_missing

_MAX_ROW_BYTES = 1 << 24
_Batch = TypeVar("_Batch", bound=tuple[Tensor, Tensor, Tensor])


def with_audit(
    batches: Iterable[_Batch],
    folder: Path,
    *,
    start_step: int,
    steps_per_epoch: int,
    rank: int,
    world_size: int,
    attempt: int,
    lr_multiplier: Callable[[int], float],
) -> Iterator[_Batch]:
    """Yield the local batches of the updates from `start_step` on, and record each of them before it is trained on.

    Args:
        batches: (images, targets, examples) of each update.
        folder: the run folder.
        start_step: number of the first update, from 0.
        steps_per_epoch: number of updates of an epoch.
        rank: rank of this process.
        world_size: number of processes.
        attempt: number of this start.
        lr_multiplier: step -> fraction of the peak learning rate.

    Raises:
        UserError: the record cannot be written.

    """
    path = folder / AUDIT / f"rank-{rank}.jsonl"
    with _report_errors(path):
        path.parent.mkdir(exist_ok=True)
        _drop_partial_row(path)
    for step, batch in enumerate(batches, start=start_step):
        images, _, examples = batch
        pixels = images.movedim(1, -1).flatten(1).contiguous().cpu().view(torch.uint8).numpy()
        row = {
            "attempt": attempt,
            "epoch": step // steps_per_epoch,
            "step": step,
            "world_size": world_size,
            "lr_multiplier": lr_multiplier(step),
            "examples": examples.tolist(),
            "pixels": [zlib.crc32(image) for image in pixels],
        }
        with _report_errors(path), path.open("a", encoding="ascii") as file:
            file.write(json.dumps(row) + "\n")
        yield batch


def _drop_partial_row(path: Path) -> None:
    """Remove a last row that a kill has cut off: the next row would be appended to the same line."""
    with path.open("ab+") as file:
        start = max(0, file.seek(0, os.SEEK_END) - _MAX_ROW_BYTES)
        file.seek(start)
        file.truncate(start + file.read().rfind(b"\n") + 1)


@contextmanager
def _report_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            describe_missing(path, error)
            or f"run.audit: {path} cannot be written ({error.strerror}): make room, or turn it off"
        ) from None
