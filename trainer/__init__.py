"""regraft's trainer: fine-tune pretrained image classifiers. `trainer.load` reads what it leaves."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.model.file import Loaded

__all__ = ["load"]


def load(path: str | PathLike[str]) -> "Loaded":
    """Return `(model, preprocess, classes)` from a run's `model.safetensors`; that one file is enough.

    `model` is in eval mode on the CPU. `preprocess` turns a path or a PIL picture into float32
    [3, image_size, image_size], so that `model(preprocess("cat.jpg")[None])` gives logits [1, len(classes)].

    Raises:
        trainer.errors.UserError: no such file, or not a model file of regraft.

    """
    from trainer.model.file import load as read  # noqa: PLC0415 (torch takes seconds to import)

    return read(path)
