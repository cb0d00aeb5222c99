"""Resolve a config: make its paths absolute, and choose the preprocessing of its weights."""

import dataclasses
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from regraft.contract import BASELINE, PRETRAIN
from trainer.config.schema import Config
from trainer.config.sections.baseline import BaselineConfig
from trainer.config.sections.data import DataConfig
from trainer.config.sections.pretrain import PretrainConfig
from trainer.config.sections.transfer import TransferConfig
from trainer.data.preprocessing import Preprocessing
from trainer.data.registry import cache_folder, is_known
from trainer.errors import UserError
from trainer.model.architectures import same_architecture
from trainer.model.build import preset
from trainer.model.metadata import read_weights_metadata
from trainer.model.torchvision_weights import is_torchvision_name

# Values of the options that describe the files of data.root, for another dataset.
_ANY_LAYOUT: dict[str, Any] = {"train_dir": None, "val_dir": None, "test_dir": None, "csv_root": None} | {
    "csv_columns": {},
    "csv_suffix": None,
    "exclude": None,
    "group_by": None,
}
_ConfigT = TypeVar("_ConfigT", bound=Config)


@dataclass(frozen=True, kw_only=True)
class ResolvedDataConfig(DataConfig):
    """The section `data` without null values, except for `num_workers`."""

    root: str
    image_size: int
    resize_size: int
    resize: Literal["squash", "shorter"]
    interpolation: Literal["bilinear", "bicubic"]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    cache: str

    @property
    def preprocessing(self) -> Preprocessing:
        """Return the conversion of an image to the model's input."""
        return Preprocessing(
            image_size=self.image_size,
            resize_size=self.resize_size,
            resize=self.resize,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )

    @property
    def has_random_transform(self) -> bool:
        """Return whether training images are augmented; otherwise they are transformed as in evaluation."""
        return self.augment != "none" or self.random_erasing > 0


@dataclass(frozen=True, kw_only=True)
class ResolvedConfig(Config):
    """A config whose values are all chosen, except for those that depend on the device."""

    data: ResolvedDataConfig


def resolve(config: Config) -> ResolvedConfig:
    """Return the config with absolute paths and the preprocessing of its weights.

    Raises:
        UserError: an unknown model or weights name, or a model file of another architecture.

    """
    data = config.data
    if data.root is None or not data.root.strip():
        raise UserError("data.root is not set: give the folder of your images, a CSV file or a dataset name")
    weights = config.model.weights
    if (
        weights is not None
        and not is_torchvision_name(weights)
        and os.path.exists(  # noqa: PTH110 (never raises)
            path := _absolute("model.weights", weights)
        )
    ):
        weights = path
    labels = config.model.source_labels
    if labels != "auto":
        labels = _absolute("model.source_labels", labels)
    model = replace(config.model, weights=weights, source_labels=labels)
    preprocessing = _preprocessing(model.name, weights)
    size = data.image_size or preprocessing.image_size
    in_proportion = round(preprocessing.resize_size * size / preprocessing.image_size)
    if data.resize_size is not None and data.resize_size < size:
        raise UserError(
            f"data.resize_size is {data.resize_size}, data.image_size {size}: expected a resize size of at least the "
            "image size, since the image is cropped after the resize"
        )
    if data.cache_resize is not None and data.cache_resize < size:
        raise UserError(
            f"data.cache_resize is {data.cache_resize}, data.image_size {size}: expected at least the image size, or "
            "crops of the whole image would be enlarged"
        )
    pretrain = config.pretrain
    if pretrain.root and not is_known(pretrain.root):
        pretrain = replace(pretrain, root=_absolute("pretrain.root", pretrain.root))
    sections: dict[str, Any] = _fields(config) | {
        "run": replace(config.run, dir=_absolute("run.dir", config.run.dir)),
        "model": model,
        "pretrain": pretrain,
        "data": ResolvedDataConfig(
            **_fields(data)
            | {
                "root": data.root if is_known(data.root) else _absolute("data.root", data.root),
                **{key: _folder_option(data, key) for key in ("train_dir", "val_dir", "test_dir", "csv_root")},
                "exclude": data.exclude if data.exclude is None else _absolute("data.exclude", data.exclude),
                "image_size": size,
                "resize_size": data.resize_size or in_proportion,
                "resize": data.resize or preprocessing.resize,
                "interpolation": data.interpolation or preprocessing.interpolation,
                "mean": data.mean or preprocessing.mean,
                "std": data.std or preprocessing.std,
                "cache": str(cache_folder(data.cache)),
            }
        ),
    }
    return ResolvedConfig(**sections)


def _fields(section: Any) -> dict[str, Any]:
    return {field.name: getattr(section, field.name) for field in dataclasses.fields(section)}


def _absolute(key: str, path: str) -> str:
    try:
        return str(Path(path).expanduser().absolute())
    except RuntimeError:  # a misspelled ~user, or a container's user without a name
        raise UserError(f"{key} is {path}, and there is no such home folder here: give the whole path") from None


def _folder_option(data: DataConfig, key: str) -> str | None:
    """Return a folder relative to the dataset, or absolute if it is one relative to the working folder."""
    folder: str | None = getattr(data, key)
    if folder is None or data.root is None:
        return folder
    base = Path(_absolute("data.root", data.root))
    in_data = (base if base.is_dir() else base.parent) / folder
    absolute = _absolute(f"data.{key}", folder)
    return absolute if folder.startswith("~") or (not in_data.exists() and Path(absolute).exists()) else folder


def _preprocessing(name: str, weights: str | None) -> Preprocessing:
    published = preset(name, weights)
    metadata = read_weights_metadata(weights) if weights else None
    if metadata is not None:
        if not same_architecture(metadata.architecture, name):
            raise UserError(
                f"model.weights {weights} contains a {metadata.architecture}, but model.name is {name}: set "
                f"model.name to {metadata.architecture}"
            )
        return metadata.preprocessing
    return published


def pretrain_config(config: ResolvedConfig) -> ResolvedConfig:
    """Return the config of the pretraining phase: from scratch, with one learning rate."""
    assert config.pretrain.root is not None  # for mypy: the phase runs only if it is set
    return replace(
        _from_scratch(config, PRETRAIN, lr=config.pretrain.lr),
        data=replace(config.data, root=config.pretrain.root, val_fraction=0.0, **_ANY_LAYOUT),
        regularization=replace(config.regularization, early_stopping=None),  # there is no split to select on
        train=replace(config.train, epochs=config.pretrain.epochs),
    )


def baseline_config(config: ResolvedConfig) -> ResolvedConfig:
    """Return the config of the baseline phase: the same network, data and budget, trained from scratch."""
    assert config.baseline.lr is not None  # for mypy: the phase runs only if it is set
    return _from_scratch(config, BASELINE, lr=config.baseline.lr)


def with_pretrained(config: _ConfigT, file: Path) -> _ConfigT:
    """Return the config with a model file as its weights, instead of a pretraining phase."""
    return replace(config, model=replace(config.model, weights=str(file)), pretrain=replace(config.pretrain, root=None))


def without_weights(config: ResolvedConfig) -> ResolvedConfig:
    """Return the config with random weights instead of pretrained ones, which need a download."""
    return replace(
        config,
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=replace(config.transfer, l2_sp=0.0, wise_ft=False),
        baseline=BaselineConfig(),
    )


def _from_scratch(config: ResolvedConfig, name: str, *, lr: float) -> ResolvedConfig:
    return replace(
        config,
        run=replace(config.run, dir=str(Path(config.run.dir) / name)),
        model=replace(config.model, weights=None, head_init="xavier"),
        transfer=TransferConfig(
            batch_norm="sync" if config.transfer.batch_norm == "sync" else TransferConfig.batch_norm
        ),
        optim=replace(config.optim, lr=lr, head_lr_scale=1.0, layer_decay=1.0, lr_mult={}),
        pretrain=PretrainConfig(),
        baseline=BaselineConfig(),
    )
