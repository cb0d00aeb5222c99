"""`regraft.train`."""

import os
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import regraft
from regraft.contract import read_attempts
from tests.folders import image_folder
from trainer.commands import train as module
from trainer.config.schema import Config
from trainer.errors import UserError


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return image_folder(tmp_path_factory.mktemp("images"), {"train": {"a b": 8, "c": 8}, "val": {"a b": 3, "c": 3}})


def options(folder: Path) -> dict[str, Any]:
    return {
        "model": {"name": "shufflenet_v2_x0_5", "weights": None},
        "data.image_size": 32,
        "data": {"num_workers": 0},
        "train": {"epochs": 2, "batch_size": 8, "precision": "fp32"},
        "run": {"dir": folder, "threads": 1, "device": "cpu"},
    }


def test_train_returns_the_result_and_a_second_call_reports_it(images: Path, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    result = regraft.train(images, **options(tmp_path / "run"))
    assert (result.folder, result.examples, len(result.rows)) == (tmp_path / "run", (16, 6), 2)
    assert torch.get_num_threads() == threads
    model = regraft.load(result.model_file)
    assert model.classes == ("a b", "c")
    assert len(model.predict([*(images / "val").rglob("*.png")])) == 6
    again = regraft.train({"data.root": images, **options(tmp_path / "run")})
    assert [row["test_loss"] for row in again.rows] == [row["test_loss"] for row in result.rows]


def test_ctrl_c_saves_and_the_same_call_resumes(images: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = options(folder) | {"checkpoint": {"every": "1 steps"}, "train": {"epochs": 8, "batch_size": 4}}

    def interrupt() -> None:
        while not list(folder.glob("checkpoints/step-*")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    with pytest.raises(KeyboardInterrupt):
        regraft.train(images, **arguments)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert 0 < max(int(path.name.split("-")[1]) for path in folder.glob("checkpoints/step-*")) < 32
    result = regraft.train(images, **arguments)
    assert [row["epoch"] for row in result.rows] == list(range(1, 9))
    assert [attempt.state for attempt in read_attempts(folder)] == ["stopped", "done"]


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        (3, {}, "regraft.train was given a int: expected a config file"),
        (None, {"optim": {"lrr": 1}}, "optim.lrr"),
        ("missing-folder", {}, "missing-folder"),
        ("missing.yaml", {}, "missing.yaml"),
        (None, {"train": {"epochs": object()}}, "regraft.train was given an option of type object"),
        (None, {"train": {"epochs": "many"}}, "train.epochs is many: expected INT"),
        (Config(), {"train": {"epochs": 1}}, "set them in the Config"),
        (None, {"debug": True}, "use the command regraft debug"),
    ],
)
def test_wrong_arguments_are_errors(
    config: Any, arguments: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        regraft.train(config, **arguments)


def test_values_become_the_text_of_the_command_line() -> None:
    values = {
        "data": {"csv_columns": {"path": "file"}, "root": Path("a b")},
        "transfer.trainable": {0: "head", 2: "all"},
        "optim": {"lr": 1e-4},
        "model.weights": None,
        "run": {"audit": True},
    }
    assert [*module._option_words(values)] == [
        '--data.csv_columns={"path": "file"}', "--data.root=a b", '--transfer.trainable={"0": "head", "2": "all"}',
        "--optim.lr=0.0001", "--model.weights=null", "--run.audit=true",
    ]  # fmt: skip
