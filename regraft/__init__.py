"""regraft: fine-tune pretrained image classifiers. `regraft.load` reads the model that a run leaves."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.model.file import LoadedModel

__all__ = ["load"]


def load(path: str | PathLike[str]) -> "LoadedModel":
    """Return `(model, preprocess, classes)` from a run's `model.safetensors`. No other file is needed.

    `model` is in eval mode on the CPU. `preprocess` turns a path or a PIL image into float32 [3, image_size,
    image_size], so that `model(preprocess("cat.jpg")[None])` returns logits [1, len(classes)].

    Raises:
        trainer.errors.UserError: there is no such file, or regraft did not write it.

    """
    from trainer.model.file import load  # noqa: PLC0415 (torch takes seconds to import)

    return load(path)
