"""Compare an exported model with the original on real images."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, repeat

import numpy as np
import torch
from torch import Tensor

from regraft.contract import available_cores
from trainer.data.decode import UnreadableImage
from trainer.errors import UserError
from trainer.inference.file_logits import map_in_threads, read_image
from trainer.model.file import LoadedModel
from trainer.model.images import Preprocess
from trainer.text import first_line

TOLERANCE = 1e-4
"""Largest difference of two logits in fp32, relative to the largest logit of all images, or to 1 if that is less."""
FP16_TOLERANCE = 1e-2
"""The same for a model in fp16: twice the largest difference that was measured (docs/serving.md)."""
_BATCH_SIZE = 8

RunExported = Callable[[Sequence[np.ndarray], Tensor], Tensor]
"""Run an exported model: images, each uint8 [H, W, 3], and the original's input for them, float32 [B, 3, S, S]
-> logits [B, K]. An export with its own preprocessing takes the images, others the input."""


@dataclass(frozen=True, kw_only=True)
class Verification:
    """How an exported model compares with the original."""

    images: int
    unreadable: int
    """Number of images that could not be read, and were left out."""
    difference: float
    """Largest absolute difference of two logits."""
    limit: float
    """The difference that is allowed."""
    correct: int
    """Number of images that the original classifies correctly."""
    exported_correct: int
    """Number of images that the exported model classifies correctly."""
    changed: int
    """Number of images that the two classify differently."""
    clearly_changed: int
    """Of these, the images whose two predicted classes have logits of the original that differ by more than `limit`."""

    @property
    def succeeded(self) -> bool:
        """Return whether the logits agree, and the predictions, too, unless two logits are equal within the limit."""
        return self.difference <= self.limit and not self.clearly_changed  # False for NaN

    def __str__(self) -> str:
        before, after = (f"{count / self.images:.4f}" for count in (self.correct, self.exported_correct))
        unreadable = f" ({self.unreadable} more cannot be read)" if self.unreadable else ""
        changed = f"{self.changed} predictions differ"
        if self.changed:
            changed += f", {self.clearly_changed} of them between classes whose logits differ by more than the limit"
        return (
            f"on {self.images} images{unreadable}, logits differ by at most {self.difference:.2g} (limit "
            f"{self.limit:.2g}); accuracy {before} of the original, {after} of the export; {changed}"
        )


@torch.inference_mode()
def verify(
    original: LoadedModel, run_exported: RunExported, examples: Sequence[tuple[str, int]], *, tolerance: float
) -> Verification:
    """Run the original in fp32 and the exported model on the same images, alone and in batches.

    Args:
        original: on the CPU.
        run_exported: runs the exported model.
        examples: (path, label) pairs; labels are those of the original.
        tolerance: allowed difference of logits, relative to the largest logit.

    Raises:
        UserError: the logits or the predictions differ, or no image can be read.

    """
    preprocess, classes = Preprocess(original.metadata.preprocessing), len(original.metadata.classes)
    expected, exported, labels = [], [], []
    for batch in _batches(_readable(examples)):
        images = [image for image, _ in batch]
        labels += [label for _, label in batch]
        inputs = preprocess(images)
        expected.append(original.module(inputs))
        exported.append(_run(run_exported, images, inputs))
        if exported[-1].shape != expected[-1].shape:
            raise UserError(
                f"the exported model returns {list(exported[-1].shape)} for {len(images)} images, expected "
                f"{[len(images), classes]}. Nothing was written"
            )
    if not labels:
        raise UserError(f"none of the {len(examples)} images to verify the export on can be read")
    unreadable = len(examples) - len(labels)
    verification = _compare(torch.cat(expected), torch.cat(exported), torch.tensor(labels), unreadable, tolerance)
    if not verification.succeeded:
        raise UserError(f"the exported model does not agree with the original: {verification}. Nothing was written")
    return verification


def _run(run_exported: RunExported, images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
    try:
        return run_exported(images, inputs).float()
    except Exception as error:  # a runtime may raise anything
        raise UserError(
            f"the exported model cannot be run on a batch of {len(images)}: {first_line(error)}. Nothing was written"
        ) from error


def _readable(examples: Sequence[tuple[str, int]]) -> Iterator[tuple[np.ndarray, int]]:
    """Yield (image, label) of the examples that can be read."""
    images = map_in_threads(read_image, (path for path, _ in examples), available_cores())
    for image, (_, label) in zip(images, examples, strict=True):
        if not isinstance(image, UnreadableImage):
            yield image, label


def _batches(images: Iterable[tuple[np.ndarray, int]]) -> Iterator[Sequence[tuple[np.ndarray, int]]]:
    """Yield the first image alone, then batches: an export may have fixed the batch size of its example input."""
    remaining = iter(images)
    for size in chain([1], repeat(_BATCH_SIZE)):
        batch = list(islice(remaining, size))
        if not batch:
            return
        yield batch


def _compare(expected: Tensor, exported: Tensor, labels: Tensor, unreadable: int, tolerance: float) -> Verification:
    predicted, exported_predicted = expected.argmax(1), exported.argmax(1)
    limit = tolerance * max(1.0, float(expected.abs().max()))
    margin = expected.amax(1) - expected.gather(1, exported_predicted[:, None]).flatten()
    return Verification(
        images=len(labels),
        unreadable=unreadable,
        difference=float((expected - exported).abs().max()),
        limit=limit,
        correct=int((predicted == labels).sum()),
        exported_correct=int((exported_predicted == labels).sum()),
        changed=int((predicted != exported_predicted).sum()),
        clearly_changed=int((margin > limit).sum()),
    )
