"""A small data set, and the options of a run on it that takes a few seconds."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import image_folder

Options = Callable[..., list[str]]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"train": {"a b": 9, "图片": 7, "c": 6}, "val": {"a b": 3, "图片": 3, "c": 2}}
    return image_folder(tmp_path_factory.mktemp("images"), parts)


@pytest.fixture
def options(images: Path, tmp_path: Path) -> Options:
    """Return the command line of a small run; keywords change it, dots written as double underscores."""

    def command_line(**changes: object) -> list[str]:
        settings: dict[str, object] = {
            "run.dir": tmp_path / "run",
            "run.threads": 1,
            "data.root": images,
            "data.image_size": 32,
            "data.num_workers": 0,
            "model.name": "shufflenet_v2_x0_5",
            "model.weights": "null",
            "train.epochs": 2,
            "train.batch_size": 8,
        }
        settings |= {key.replace("__", "."): value for key, value in changes.items()}
        return [f"--{key}={value}" for key, value in settings.items()]

    return command_line
