"""Predict labeled image files with a loaded model."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from regraft.contract import physical_cores
from trainer.distributed.allocator import keep_freed_memory
from trainer.evaluation.logits import compute_logits
from trainer.evaluation.predictions import Predictions
from trainer.inference.predictor import Predictor, eval_execution, find_device
from trainer.model.file import load
from trainer.model.metadata import ModelMetadata
from trainer.report.progress import counting
from trainer.text import escape_unprintable

_MAX_SHOWN = 10
_GPU_BATCH = 128


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
        self._predictor = Predictor(loaded, chosen, eval_execution(loaded.metadata, chosen))
        # As trainer.config.build_loaders chooses it: kernels may round differently for another batch size, too.
        self._batch_size = batch_size or (max(8, 4 * torch.get_num_threads()) if chosen.type == "cpu" else _GPU_BATCH)
        self._console = console

    def predict(self, paths: Sequence[str], labels: Sequence[int]) -> FilePredictions:
        """Return the predictions of labeled images.

        Raises:
            UserError: no image can be read, or a logit is not finite.

        """
        logits, readable, errors = self._compute(paths)
        kept = torch.tensor([labels[number] for number in readable], dtype=torch.int64)
        return FilePredictions(
            paths=tuple(paths[number] for number in readable), predictions=Predictions(logits, kept), errors=errors
        )

    def logits(self, paths: Sequence[str]) -> Tensor:
        """Return the logits of images without a label, float32 [N, K]; raises a UserError as `predict` does."""
        return self._compute(paths)[0]

    def _compute(self, paths: Sequence[str]) -> tuple[Tensor, tuple[int, ...], dict[str, str]]:
        with counting(self._console, "evaluating") as show:
            result = compute_logits(
                self._predictor.logits,
                self.metadata.preprocessing,
                paths,
                batch_size=self._batch_size,
                on_progress=show,
            )
        if result.errors:
            shown = "".join(
                f"\n  {escape_unprintable(path)}: {reason}" for path, reason in list(result.errors.items())[:_MAX_SHOWN]
            )
            more = len(result.errors) - _MAX_SHOWN
            self._console.print(
                f"{len(result.errors)} of {len(paths)} images cannot be read and are left out:{shown}"
                + (f"\n  and {more} more" if more > 0 else "")
            )
        return result.logits, result.readable, result.errors
