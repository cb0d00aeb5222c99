"""What the programs of this folder share: their options, their models, and the record of their epochs."""

import argparse
import contextlib
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets, models, transforms

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
HEADS = ("fc", "classifier", "head", "heads")
"""Names of the modules that hold the output layer in torchvision's models."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Options of one training, the same for every program."""

    data_root: Path
    """Image folder with `train/` and `val/`."""
    record: Path
    """JSON file to write."""
    model: str
    weights: Path | None
    """File of pretrained weights (.safetensors, torchvision's names); None: random weights."""
    epochs: int
    batch_size: int
    lr: float
    precision: Literal["default", "fp32", "bf16"]
    """`default` leaves the choice to the program."""
    layout: Literal["default", "contiguous", "channels_last"]
    """Memory layout of images and convolutions; `default`: channels_last in bf16, as PyTorch's documentation says."""
    reduction: Literal["mean", "sum"]
    """Whether the loss is the mean or the sum over a batch."""
    config: Path | None
    """Recipe (YAML) that regraft trains with; of the other options it then takes the data, the weights and the seed."""
    trainable: Literal["all", "last", "head"]
    """Everything, the last stage and the head, or the head alone."""
    fixed_views: bool
    """Train on the images as they are evaluated, without random crops."""
    threads: int
    extra: tuple[str, ...]
    """More options of regraft, as `data.cache_images=off`."""
    workers: int
    """Worker processes of the loader."""
    seed: int
    began: float
    """Time at which the program had imported what it needs [seconds of `time.perf_counter`]."""

    @property
    def device(self) -> torch.device:
        """Return the GPU if there is one."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def memory_format(self) -> torch.memory_format:
        """Return PyTorch's name of the layout."""
        is_last = self.layout == "channels_last" or (self.layout == "default" and self.precision == "bf16")
        return torch.channels_last if is_last else torch.contiguous_format

    @property
    def criterion(self) -> nn.Module:
        """Return the loss."""
        return nn.CrossEntropyLoss(reduction=self.reduction)

    @property
    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return a context that computes in bf16 if that is asked for."""
        if self.precision != "bf16":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, torch.bfloat16)


def read_settings() -> Settings:
    """Return the settings of the command line, and set the number of CPU threads."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--record", type=Path, required=True)
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", choices=("default", "fp32", "bf16"), default="default")
    parser.add_argument("--layout", choices=("default", "contiguous", "channels_last"), default="default")
    parser.add_argument("--reduction", choices=("mean", "sum"), default="mean")
    parser.add_argument("--config", type=Path)
    parser.add_argument("--trainable", choices=("all", "last", "head"), default="all")
    parser.add_argument("--fixed-views", action="store_true")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--extra", action="append", default=[])
    arguments = vars(parser.parse_args())
    settings = Settings(**arguments | {"extra": tuple(arguments["extra"])}, began=time.perf_counter())
    torch.set_num_threads(settings.threads)
    torch.manual_seed(settings.seed)
    return settings


def image_folders(settings: Settings) -> tuple[datasets.ImageFolder, datasets.ImageFolder]:
    """Return the images of (train, val), under the transforms of the D2L recipe."""
    normalize = transforms.Normalize(MEAN, STD)
    evaluated = transforms.Compose(
        [transforms.Resize([256, 256]), transforms.CenterCrop(224), transforms.ToTensor(), normalize]
    )
    augmented = transforms.Compose(
        [transforms.RandomResizedCrop(224), transforms.RandomHorizontalFlip(), transforms.ToTensor(), normalize]
    )
    train = datasets.ImageFolder(settings.data_root / "train", evaluated if settings.fixed_views else augmented)
    return train, datasets.ImageFolder(settings.data_root / "val", evaluated)


def loaders(settings: Settings, train: Dataset[Any], val: Dataset[Any]) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Return PyTorch's loaders of (train, val)."""
    workers = {"num_workers": settings.workers, "persistent_workers": settings.workers > 0}
    return (
        DataLoader(train, batch_size=settings.batch_size, shuffle=True, **workers),
        DataLoader(val, batch_size=settings.batch_size, **workers),
    )


def recipe_optimizer(
    settings: Settings, backbone: list[nn.Parameter], head: list[nn.Parameter]
) -> torch.optim.Optimizer:
    """Return SGD with 10 times the learning rate for the head, as in the D2L recipe."""
    groups = [{"params": backbone}, {"params": head, "lr": 10 * settings.lr}]
    return torch.optim.SGD(groups, lr=settings.lr, weight_decay=1e-3)


def torchvision_model(settings: Settings, classes: int) -> tuple[nn.Module, list[nn.Parameter], list[nn.Parameter]]:
    """Return a torchvision model with a new output layer, and its trainable parameters: (model, backbone, head)."""
    model = models.get_model(settings.model, num_classes=classes)
    load_weights(model, settings)
    model.to(settings.device, memory_format=settings.memory_format)
    return model, *select_parameters(model, settings)


def load_weights(model: nn.Module, settings: Settings) -> None:
    """Copy the pretrained weights, if there are any, except those of the output layer."""
    if settings.weights is not None:
        weights, own = load_file(settings.weights), model.state_dict()
        model.load_state_dict(own | {k: v for k, v in weights.items() if v.shape == own[k].shape})


def select_parameters(model: nn.Module, settings: Settings) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Freeze what settings.trainable excludes; return the trainable parameters of (backbone, head)."""
    name = next(name for name in HEADS if hasattr(model, name))
    head = list(getattr(model, name).parameters())
    ids = {id(parameter) for parameter in head}
    backbone = [parameter for parameter in model.parameters() if id(parameter) not in ids]
    if settings.trainable != "all":
        for parameter in backbone:
            parameter.requires_grad_(False)
    if settings.trainable == "last":
        model.layer4.requires_grad_(True)
    return [parameter for parameter in backbone if parameter.requires_grad], head


class Recorder:
    """Writes one row per epoch (images, seconds of training, accuracy), and the seconds since all was imported."""

    def __init__(self, settings: Settings) -> None:
        self._settings, self._rows = settings, list[dict[str, float]]()
        self._began = 0.0

    def start_epoch(self) -> None:
        """Start the clock of an epoch of training."""
        wait(self._settings.device)
        self._began = time.perf_counter()

    def end_training(self, images: int) -> None:
        """Stop the clock: all updates of the epoch are made."""
        wait(self._settings.device)
        self._rows.append({"images": images, "seconds": time.perf_counter() - self._began})

    def end_epoch(self, accuracy: float) -> None:
        """Add the accuracy of the epoch, and write the record."""
        self._rows[-1]["accuracy"] = accuracy
        self.write(self._rows)

    def write(self, rows: list[dict[str, float]]) -> None:
        """Write the rows of all epochs."""
        settings = {key: str(value) for key, value in asdict(self._settings).items()}
        seconds = time.perf_counter() - self._settings.began
        self._settings.record.write_text(json.dumps({"settings": settings, "epochs": rows, "seconds": seconds}))


def wait(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], settings: Settings) -> float:
    """Return the fraction of correct predictions."""
    correct = seen = 0
    for images, labels in batches:
        logits = model(images.to(settings.device, memory_format=settings.memory_format))
        correct += int((logits.argmax(dim=1).cpu() == labels.cpu()).sum())
        seen += len(labels)
    return correct / seen
