"""A small data set, and the options of a run on it that takes a few seconds."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.folders import image_folder
from tests.launching import command_line

Options = Callable[..., list[str]]
Train = Callable[[int, Sequence[str]], str]


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": {"a b": 9, "图片": 7, "c": 6}, "val": {"a b": 3, "图片": 3, "c": 2}}
    return image_folder(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture
def options(images: Path, tmp_path: Path) -> Options:
    """Return a function: changes, dots written as double underscores -> the options of a small run."""

    def make(**changes: object) -> list[str]:
        settings: dict[str, object] = {
            "run.dir": tmp_path / "run", "run.threads": 1, "run.device": "cpu", "data.root": images,
            "data.image_size": 32, "data.num_workers": 0, "model.name": "shufflenet_v2_x0_5", "model.weights": "null",
            "train.epochs": 2, "train.batch_size": 8,
        }  # fmt: skip
        return command_line(settings, changes)

    return make


@pytest.fixture
def train(capsys: pytest.CaptureFixture[str]) -> Train:
    """Return a function that trains in this process, checks the exit code, and returns the output."""
    from trainer.main import main

    def train(code: int, arguments: Sequence[str]) -> str:
        returned = main(arguments)
        printed = capsys.readouterr()
        output = printed.out + printed.err
        assert returned == code, output
        assert "Traceback" not in output
        return output

    return train
