"""regraft: fine-tune pretrained image classifiers. `regraft.load` reads the model that a run leaves; `train` runs."""

from collections.abc import Mapping
from os import PathLike
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from trainer.config.schema import Config
    from trainer.inference.image_classifier import ImageClassifier
    from trainer.report.summary import TrainResult

__all__ = ["load", "train"]

# The functions import the trainer, since torch takes seconds to import.


def load(path: str | PathLike[str], *, device: "str | torch.device" = "cpu") -> "ImageClassifier":
    """Return the model of a run folder or of its `model.safetensors`. No other file is needed.

    The model has these attributes:

    - `predict(images, topk=1)`: a list of predictions with class names and probabilities.
    - `features(images)`: the input of the output layer, float32 [N, D].
    - `module`: the plain `nn.Module` in eval mode: float32 [B, 3, image_size, image_size] -> logits [B, K].
    - `preprocess(image)`: float32 [3, image_size, image_size]; of a list, [N, 3, image_size, image_size].
    - `classes`: the K class names.
    - `metadata`: the header of the file.

    An image is a path, bytes, a file opened with mode "rb", a PIL image, or a NumPy array of uint8 [height, width] or
    [height, width, 3 or 4]. Several threads may use one model at the same time.

    Args:
        path: the run folder or the file.
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.

    Raises:
        trainer.errors.UserError: there is no such file, regraft did not write it, or there is no such device.

    """
    from trainer.inference.image_classifier import load  # noqa: PLC0415

    return load(path, device=device)


def train(
    config: "str | PathLike[str] | Mapping[str, object] | Config | None" = None, /, **options: object
) -> "TrainResult":
    """Train in this process as `regraft train` does, and return the result. The same call resumes a stopped run.

    `regraft.train("photos", model={"name": "resnet50"}, optim={"lr": 1e-4})` trains on the folder `photos`.

    The result has the run folder (`folder`), the model file (`model_file`, which `regraft.load` reads) and the metrics
    of each epoch (`rows`). In the main thread, Ctrl-C saves the state and then raises KeyboardInterrupt.

    Args:
        config: a config file (.yaml), the folder or the CSV of a dataset, or options as for `options`.
        options: options of the trainer, `data={"root": "photos"}`; a mapping may also have the keys `data.root`.

    Raises:
        trainer.errors.UserError: a wrong option, a wrong image, or another error that the user can fix.

    """
    from trainer.commands.train import train  # noqa: PLC0415

    return train(config, options)
