"""Compute the logits of image files, with the preprocessing and the batches of a run's evaluation."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from regraft.contract import available_cores
from trainer.data.augment import EvalTransform, Preprocessing
from trainer.data.decode import UnreadableImage, decode
from trainer.errors import UserError

_BATCHES_AHEAD = 3


@dataclass(frozen=True)
class FileLogits:
    """Logits of the image files that can be read."""

    logits: Tensor
    """float32 [N, K], on the CPU, in the order of the files."""
    readable: tuple[int, ...]
    """Position of each of the N files in the list."""
    errors: dict[str, str]
    """Path of a file that cannot be read -> reason."""


def compute_logits(
    compute: Callable[[Tensor], Tensor],
    preprocessing: Preprocessing,
    paths: Sequence[str],
    *,
    batch_size: int,
    on_progress: Callable[[int, int], object] | None = None,
) -> FileLogits:
    """Return the logits of image files.

    Args:
        compute: images, uint8 [B, 3, S, S] -> logits, float32 [B, K].
        preprocessing: of the model.
        paths: the files.
        batch_size: number of images in a forward pass.
        on_progress: called with (number of files done, number of files).

    Raises:
        UserError: no file can be read, or a logit is not finite.

    """
    transform = EvalTransform(preprocessing)
    errors: dict[str, str] = {}
    parts: list[Tensor] = []
    readable: list[int] = []

    def read(path: str) -> np.ndarray | UnreadableImage:
        try:
            return transform(decode(path))
        except UnreadableImage as error:
            return error

    def flush(images: list[np.ndarray]) -> None:
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        parts.append(compute(batch).cpu())
        images.clear()

    pending: list[np.ndarray] = []
    for number, image in enumerate(_ahead(read, paths, _BATCHES_AHEAD * batch_size)):
        if isinstance(image, UnreadableImage):
            errors[paths[number]] = str(image)
        else:
            pending.append(image)
            readable.append(number)
            if len(pending) == batch_size:
                flush(pending)
        if on_progress is not None:
            on_progress(number + 1, len(paths))
    if pending:
        flush(pending)
    if not parts:
        raise UserError(f"none of the {len(paths)} images can be read, such as {paths[0]}: {errors[paths[0]]}")
    logits = torch.cat(parts)
    if not torch.isfinite(logits).all():
        raise UserError("the model's outputs are not finite: its weights are damaged, or it overflows in its precision")
    return FileLogits(logits, tuple(readable), errors)


def _ahead(
    function: Callable[[str], np.ndarray | UnreadableImage], paths: Sequence[str], count: int
) -> Iterator[np.ndarray | UnreadableImage]:
    """Yield the results of a function, computed by threads at most `count` paths ahead."""
    waiting = iter(paths)
    with ThreadPoolExecutor(available_cores()) as pool:
        futures: deque[Future[np.ndarray | UnreadableImage]] = deque(
            pool.submit(function, path) for path in islice(waiting, count)
        )
        try:
            while futures:
                yield futures.popleft().result()
                futures.extend(pool.submit(function, path) for path in islice(waiting, 1))
        finally:
            pool.shutdown(cancel_futures=True)
