"""A tiny dataset, and options to train on it."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import image_folder

Options = Callable[..., list[str]]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": {"a": 3, "b": 3}, "test": {"a": 2, "b": 2}}
    return image_folder(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture
def options(images: Path, tmp_path: Path) -> Options:
    """Return a function that returns a command line; `section__key=value` changes an option."""

    def command_line(folder: str = "run", **changes: object) -> list[str]:
        defaults: dict[str, object] = {
            "run.dir": tmp_path / folder, "run.device": "cpu", "run.threads": 1, "data.root": images,
            "data.image_size": 32, "data.num_workers": 0, "data.cache": tmp_path / "cache",
            "model.name": "squeezenet1_1", "model.weights": "null", "train.epochs": 1, "train.batch_size": 4,
        }  # fmt: skip
        changed = {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in (defaults | changed).items()]

    return command_line
