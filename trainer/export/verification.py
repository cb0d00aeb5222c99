"""Compare an exported model with the original on real images."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.data.decode import UnreadableImage, decode
from trainer.errors import UserError
from trainer.model.file import LoadedModel
from trainer.model.images import Preprocess
from trainer.text import escape_unprintable

TOLERANCE = 1e-4
"""Largest difference of two logits in fp32, relative to the largest logit of all images, or to 1 if that is less."""
FP16_TOLERANCE = 2e-2
"""The same for a model in fp16."""
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

    @property
    def succeeded(self) -> bool:
        """Return whether the logits agree, and the accuracy falls by at most 1 % of the images.

        If the logits agree, two classes can only change places if their logits are as close as that.
        """
        lost = self.correct - self.exported_correct
        return self.difference <= self.limit and lost <= max(1, self.images // 100)  # False for NaN

    def __str__(self) -> str:
        before, after = (f"{count / self.images:.4f}" for count in (self.correct, self.exported_correct))
        unreadable = f" ({self.unreadable} more cannot be read)" if self.unreadable else ""
        return (
            f"on {self.images} images{unreadable}, logits differ by at most {self.difference:.2g} (limit "
            f"{self.limit:.2g}); accuracy {before} of the original, {after} of the export; {self.changed} predictions "
            "differ"
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
        UserError: the logits differ by more, or no image can be read.

    """
    preprocess, classes = Preprocess(original.metadata.preprocessing), len(original.metadata.classes)
    expected, exported, labels = [], [], []
    unreadable = 0
    for batch in _batches(examples):
        images = []
        for path, label in batch:
            try:
                images.append(decode(path))
            except UnreadableImage:
                unreadable += 1
                continue
            labels.append(label)
        if not images:
            continue
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
    verification = _compare(torch.cat(expected), torch.cat(exported), torch.tensor(labels), unreadable, tolerance)
    if not verification.succeeded:
        raise UserError(f"the exported model does not agree with the original: {verification}. Nothing was written")
    return verification


def _run(run_exported: RunExported, images: Sequence[np.ndarray], inputs: Tensor) -> Tensor:
    try:
        return run_exported(images, inputs).float()
    except Exception as error:  # a runtime may raise anything
        reason = escape_unprintable((str(error).strip().splitlines() or [type(error).__name__])[0])[:300]
        raise UserError(
            f"the exported model cannot be run on a batch of {len(images)}: {reason}. Nothing was written"
        ) from error


def _batches(examples: Sequence[tuple[str, int]]) -> Iterator[Sequence[tuple[str, int]]]:
    """Yield the first example alone, then batches: an export may have fixed the batch size of its example input."""
    yield examples[:1]
    for start in range(1, len(examples), _BATCH_SIZE):
        yield examples[start : start + _BATCH_SIZE]


def _compare(expected: Tensor, exported: Tensor, labels: Tensor, unreadable: int, tolerance: float) -> Verification:
    predicted, exported_predicted = expected.argmax(1), exported.argmax(1)
    return Verification(
        images=len(labels),
        unreadable=unreadable,
        difference=float((expected - exported).abs().max()),
        limit=tolerance * max(1.0, float(expected.abs().max())),
        correct=int((predicted == labels).sum()),
        exported_correct=int((exported_predicted == labels).sum()),
        changed=int((predicted != exported_predicted).sum()),
    )
