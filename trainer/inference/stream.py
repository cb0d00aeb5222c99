"""Predict image files in batches: threads decode and compute, and the results keep their order."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.augment import EvalTransform
from trainer.data.decode import UnreadableImage, decode
from trainer.errors import UserError
from trainer.inference.answers import AnswerOptions, Prediction, make_predictions
from trainer.inference.predictor import Predictor, auto_batch_size
from trainer.inference.rows import Row
from trainer.model.metadata import ModelMetadata


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How many images are predicted at once."""

    batch_size: int | None
    """Images in a forward pass; None chooses, and halves the batch on a GPU whose memory is too small."""
    threads: int
    """Batches that are decoded and computed at the same time."""


class FilePredictor:
    """Predicts image files. The preprocessing is that of a run's evaluation."""

    def __init__(
        self, predictor: Predictor, metadata: ModelMetadata, options: AnswerOptions, batches: BatchOptions
    ) -> None:
        self._predictor, self._options, self._batches = predictor, options, batches
        self._classes = metadata.classes
        self._transform = EvalTransform(metadata.preprocessing)
        self._batch_size = batches.batch_size or auto_batch_size(predictor.device)
        self._limit = self._batch_size

    def __call__(self, paths: Sequence[str]) -> Iterator[list[Row]]:
        """Yield the rows of each batch, in the order of the paths. Images that cannot be read have an error.

        Raises:
            UserError: a batch does not fit in the memory of the device.

        """
        pool = ThreadPoolExecutor(self._batches.threads, thread_name_prefix="predict")
        pending: deque[Future[list[Row]]] = deque()
        try:
            for start in range(0, len(paths), self._batch_size):
                pending.append(pool.submit(self._predict, paths[start : start + self._batch_size]))
                if len(pending) > 2 * self._batches.threads:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _predict(self, paths: Sequence[str]) -> list[Row]:
        images: list[np.ndarray] = []
        errors: dict[str, str] = {}
        for path in paths:
            try:
                images.append(self._transform(decode(path)))
            except UnreadableImage as error:
                errors[path] = str(error)
        predictions: Iterator[Prediction] = iter(())
        if images:
            logits = self._logits(torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2))
            predictions = iter(make_predictions(logits, self._classes, self._options))
        return [Row(path, None, errors[path]) if path in errors else Row(path, next(predictions)) for path in paths]

    def _logits(self, images: Tensor) -> Tensor:
        while True:
            limit = self._limit
            try:
                parts = [self._predictor.logits(part, tta=self._options.tta) for part in images.split(limit)]
                return torch.cat(parts)
            except torch.OutOfMemoryError:
                if self._batches.batch_size is not None or limit == 1:
                    raise UserError(
                        f"--batch-size {limit}: a batch does not fit in the memory of {self._predictor.device}; choose "
                        "a smaller one, or auto"
                    ) from None
            torch.cuda.empty_cache()
            self._limit = min(self._limit, limit // 2)
