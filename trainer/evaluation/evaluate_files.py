"""Predict labeled image files with a loaded model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from regraft.contract import available_cores, physical_cores
from trainer.distributed.allocator import keep_freed_memory
from trainer.errors import UserError
from trainer.evaluation.predictions import Predictions
from trainer.inference.file_logits import BatchOptions, FileLogits
from trainer.inference.predictor import find_device, make_predictor
from trainer.model.file import load
from trainer.model.metadata import ModelMetadata
from trainer.report.progress import counting
from trainer.text import escape_unprintable, list_lines


@dataclass(frozen=True, kw_only=True)
class FilePredictions:
    """Predictions of the image files that can be read."""

    paths: tuple[str, ...]
    predictions: Predictions
    errors: dict[str, str]
    """Path of a file that cannot be read -> reason."""


class FileEvaluator:
    """Computes the logits of image files as the run's evaluation does, and names those that cannot be read."""

    def __init__(self, model: Path, *, device: str, batch_size: int | None, console: Console) -> None:
        """Load a model file.

        Args:
            model: the file.
            device: auto, cpu or cuda.
            batch_size: number of images in a forward pass; None: as in the run's evaluation.
            console: shows the progress, and what cannot be read.

        Raises:
            UserError: the file or the device cannot be used.

        """
        loaded, chosen = load(model), find_device(device)
        if chosen.type == "cpu":  # as in a run: kernels may round differently for another number of threads
            torch.set_num_threads(physical_cores())
            keep_freed_memory(os.environ)
        self.metadata: ModelMetadata = loaded.metadata
        predictor = make_predictor(loaded, chosen, warn=console.print)
        # While a thread computes a batch, the others decode the next ones.
        options = BatchOptions(batch_size=batch_size, threads=available_cores() + 1, one_forward_at_a_time=True)
        self._logits = FileLogits(predictor, loaded.metadata, options)
        self._console = console

    def predict(self, paths: Sequence[str], labels: Sequence[int]) -> FilePredictions:
        """Return the predictions of labeled images.

        Raises:
            UserError: no image can be read, or see `FileLogits`.

        """
        logits, errors = self._compute(paths)
        readable = [number for number, error in enumerate(errors) if error is None]
        kept = torch.tensor([labels[number] for number in readable], dtype=torch.int64)
        return FilePredictions(
            paths=tuple(paths[number] for number in readable),
            predictions=Predictions(logits, kept),
            errors={path: error for path, error in zip(paths, errors, strict=True) if error is not None},
        )

    def logits(self, paths: Sequence[str]) -> Tensor:
        """Return the logits of images without a label, float32 [N, K]; raises a UserError as `predict` does."""
        return self._compute(paths)[0]

    def _compute(self, paths: Sequence[str]) -> tuple[Tensor, list[str | None]]:
        """Return the logits of the images that can be read; and of each image, why it cannot be read, or None."""
        parts: list[Tensor] = []
        errors: list[str | None] = []
        with counting(self._console, "evaluating") as show:
            for batch in self._logits(paths):
                parts.append(batch.logits)
                errors += batch.errors
                if show is not None:
                    show(len(errors), len(paths))
        unreadable = [
            f"{escape_unprintable(path)}: {error}"
            for path, error in zip(paths, errors, strict=True)
            if error is not None
        ]
        if len(unreadable) == len(paths):
            raise UserError(f"none of the {len(paths)} images can be read, such as {unreadable[0]}")
        if unreadable:
            self._console.print(
                f"{len(unreadable)} of {len(paths)} images cannot be read and are left out:{list_lines(unreadable)}"
            )
        return torch.cat(parts), errors
