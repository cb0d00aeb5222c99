"""regraft: fine-tune pretrained image classifiers. `regraft.load` reads the model that a run leaves."""

from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trainer.model.file import LoadedModel

__all__ = ["load"]


def load(path: str | PathLike[str]) -> "LoadedModel":
    """Return `(model, preprocess, classes)` of a run folder or of its `model.safetensors`. No other file is needed.

    `model` is in eval mode on the CPU. `preprocess` converts an image to float32 [3, image_size, image_size], so that
    `model(preprocess("cat.jpg")[None])` returns logits [1, len(classes)]. The method `predict` returns class names and
    probabilities: `regraft.load("runs/NAME").predict(["cat.jpg", "dog.jpg"], topk=3)`.

    An image is a path, bytes, a file opened with mode "rb", a PIL image, or a NumPy array of uint8 [height, width] or
    [height, width, 3 or 4].

    Raises:
        trainer.errors.UserError: there is no such file, or regraft did not write it.

    """
    from trainer.model.file import load  # noqa: PLC0415 (torch takes seconds to import)

    return load(path)
