"""Compute the logits of image files in batches: threads decode and compute, and the batches keep their order.

`regraft predict` and `regraft evaluate` read their images here.
"""

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import EvalTransform
from trainer.data.decode import UnreadableImage, decode
from trainer.errors import UserError
from trainer.evaluate import choose_eval_batch_size
from trainer.model.metadata import ModelMetadata

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many images are computed at once."""

    batch_size: int | None
    """Images in a forward pass; None chooses, and halves the batch on a GPU whose memory is too small."""
    threads: int
    """Batches that are decoded at the same time."""
    one_forward_at_a_time: bool = False
    """Whether one batch is computed at a time, by all of torch's threads, as in a run's evaluation. Otherwise several
    are, which is faster if torch has one thread."""


class LogitsModel(Protocol):
    """Computes logits, as a `Predictor` does."""

    device: torch.device

    def logits(self, images: Tensor, *, tta: bool) -> Tensor:
        """Return logits, float32 [B, K], of images, uint8 [B, 3, S, S]."""


class BatchLogits(NamedTuple):
    """The logits of a batch of image files."""

    paths: Sequence[str]
    logits: Tensor
    """float32 [N, K], on the CPU: of the N images that can be read, in the order of the paths."""
    errors: Sequence[str | None]
    """Of each path, why it cannot be read; None if it can."""


class FileLogits:
    """Computes the logits of image files. The preprocessing is that of a run's evaluation."""

    def __init__(
        self, model: LogitsModel, metadata: ModelMetadata, options: BatchOptions, *, tta: bool = False
    ) -> None:
        """Take the model.

        Args:
            model: computes the logits.
            metadata: header of the model file.
            options: how many images are computed at once.
            tta: see `Predictor.logits`.

        """
        self._model, self._options, self._tta = model, options, tta
        self._classes = len(metadata.classes)
        self._transform = EvalTransform(metadata.preprocessing)
        self.batch_size = options.batch_size or choose_eval_batch_size(model.device, threads=torch.get_num_threads())
        self._limit = self.batch_size
        self._forward = threading.Lock() if options.one_forward_at_a_time else nullcontext()

    def __call__(self, paths: Sequence[str]) -> Iterator[BatchLogits]:
        """Yield the logits of each batch, in the order of the paths.

        Raises:
            UserError: a batch does not fit in the memory of the device, or a logit is not finite.

        """
        size = self.batch_size
        batches = (paths[start : start + size] for start in range(0, len(paths), size))
        return map_in_threads(self._compute, batches, self._options.threads)

    def _compute(self, paths: Sequence[str]) -> BatchLogits:
        read = [read_image(path, self._transform) for path in paths]
        images = [image for image in read if not isinstance(image, UnreadableImage)]
        errors = [str(image) if isinstance(image, UnreadableImage) else None for image in read]
        if not images:
            return BatchLogits(paths, torch.empty(0, self._classes), errors)
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        with self._forward:
            logits = self._logits(batch).cpu()
        if not torch.isfinite(logits).all():
            raise UserError(
                "the model's outputs are not finite: its weights are damaged, or it overflows in its precision"
            )
        return BatchLogits(paths, logits, errors)

    def _logits(self, images: Tensor) -> Tensor:
        while True:
            limit = self._limit
            try:
                parts = [self._model.logits(part, tta=self._tta) for part in images.split(limit)]
                return torch.cat(parts)
            except torch.OutOfMemoryError:
                if self._options.batch_size is not None or limit == 1:
                    raise UserError(
                        f"--batch-size {limit}: a batch does not fit in the memory of {self._model.device}; choose "
                        "a smaller one, or auto"
                    ) from None
            torch.cuda.empty_cache()
            self._limit = min(self._limit, limit // 2)


def read_image(path: str, transform: Callable[[np.ndarray], np.ndarray] | None = None) -> np.ndarray | UnreadableImage:
    """Return the image in a file, uint8 [H, W, 3], transformed; or why it cannot be read."""
    try:
        image = decode(path)
    except UnreadableImage as error:
        return error
    return image if transform is None else transform(image)


def map_in_threads(function: Callable[[_Item], _Result], items: Iterable[_Item], threads: int) -> Iterator[_Result]:
    """Yield the results of a function in the order of the items; threads compute a few of them ahead."""
    pool = ThreadPoolExecutor(threads, thread_name_prefix="images")
    pending: deque[Future[_Result]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(function, item))
            if len(pending) > 2 * threads:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
