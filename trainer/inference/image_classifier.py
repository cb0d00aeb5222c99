"""The Python API's model: `regraft.load` returns an `ImageClassifier`."""

import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.evaluate import choose_eval_batch_size
from trainer.inference.answers import AnswerOptions, Prediction, make_predictions, require_temperature
from trainer.inference.predictor import find_device, make_predictor
from trainer.model.file import LoadedModel, find_model_file
from trainer.model.file import load as load_file
from trainer.model.images import ImageInput, Preprocess
from trainer.model.metadata import ModelMetadata

Images = ImageInput | Sequence[ImageInput]
"""An image, or a list of images."""


class ImageClassifier:
    """A trained model, ready to predict with. Several threads may use one at the same time.

    `module, preprocess, classes = model` unpacks it.
    """

    def __init__(self, loaded: LoadedModel, file: Path, device: torch.device) -> None:
        """Move the model of a file to a device."""
        self._predictor = make_predictor(loaded, device, warn=warnings.warn)
        self._module, self._file = loaded.module, file
        self.metadata: ModelMetadata = loaded.metadata
        """Header of the model file: architecture, source of the weights, metrics, calibration."""
        self.classes: tuple[str, ...] = loaded.metadata.classes
        """Class names, in the order of the logits."""
        self.preprocess = Preprocess(loaded.metadata.preprocessing)
        """Converts an image to float32 [3, image_size, image_size], or a list to [N, 3, image_size, image_size]."""

    @property
    def module(self) -> nn.Module:
        """Return the plain model, in eval mode: float32 [B, 3, image_size, image_size] -> logits [B, K].

        Its weights are float32. Their memory layout is that of the run's evaluation.
        """
        return self._module

    @property
    def device(self) -> torch.device:
        """Return the device that computes the predictions."""
        return self._predictor.device

    def __iter__(self) -> Iterator[Any]:
        """Yield module, preprocess and classes."""
        return iter((self.module, self.preprocess, self.classes))

    def predict(
        self,
        images: Images,
        *,
        topk: int = 1,
        batch_size: int | None = None,
        calibrated: bool = False,
        tta: bool = False,
    ) -> list[Prediction]:
        """Return a prediction for each image.

        Args:
            images: a path, bytes, a binary file, a PIL image, a NumPy array of uint8 [height, width] or [height, width,
                3 or 4], or a list of these.
            topk: number of classes in each prediction; with fewer classes, all of them.
            batch_size: number of images in a forward pass; None: as in a run's evaluation on a CPU, 128 on a GPU.
            calibrated: divide the logits by the temperature in the model file's header.
            tta: test-time augmentation: average the logits of each image and of its mirror image.

        Raises:
            UserError: an image cannot be read, an argument is out of range, or the model is not calibrated.

        """
        _check_count("topk", topk)
        temperature = require_temperature(self.metadata, self._file) if calibrated else 1.0
        options = AnswerOptions(topk=topk, temperature=temperature, tta=tta)
        predictions: list[Prediction] = []
        for logits in self._batches(images, batch_size, lambda batch: self._predictor.logits(batch, tta=tta)):
            predictions += make_predictions(logits, self.classes, options)
        return predictions

    def features(self, images: Images, *, batch_size: int | None = None) -> Tensor:
        """Return the features of images, float32 [N, D] on the CPU: the input of the output layer.

        Images and batch_size are as for `predict`. Features of a convolutional output layer are averaged over
        positions.

        Raises:
            UserError: an image cannot be read, or batch_size is out of range.

        """
        batches = [batch.cpu() for batch in self._batches(images, batch_size, self._predictor.features)]
        if batches:
            return torch.cat(batches)
        size = self.preprocess.preprocessing.image_size
        return self._predictor.features(torch.zeros(1, 3, size, size, dtype=torch.uint8))[:0].cpu().clone()

    def _batches(self, images: Images, batch_size: int | None, compute: Callable[[Tensor], Tensor]) -> Iterator[Tensor]:
        """Yield the output of each batch."""
        if batch_size is None:
            batch_size = choose_eval_batch_size(self.device, threads=torch.get_num_threads())
        _check_count("batch_size", batch_size)
        inputs, names = [cast(ImageInput, images)], ["the image"]
        if isinstance(images, list | tuple):
            inputs, names = list(images), [f"images[{number}]" for number in range(len(images))]
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for start in range(0, len(inputs), batch_size):
                batch = list(zip(inputs[start : start + batch_size], names[start : start + batch_size], strict=True))
                if all(isinstance(image, str | os.PathLike) for image, _ in batch):
                    pixels = list(pool.map(self._pixels, batch))
                else:  # one PIL image or open file may be there twice, and cannot be read by two threads at once
                    pixels = list(map(self._pixels, batch))
                yield compute(torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2))

    def _pixels(self, named: tuple[ImageInput, str]) -> np.ndarray:
        return self.preprocess.pixels(*named)


def load(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> ImageClassifier:
    """Return the model of a run folder or of a model file; see `regraft.load`."""
    return ImageClassifier(load_file(path), find_model_file(path), find_device(device))


def _check_count(name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise UserError(f"{name} is {value!r}: expected a whole number, 1 or more")
