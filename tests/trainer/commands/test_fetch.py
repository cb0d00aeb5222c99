from pathlib import Path

import pytest

from tests.folders import image_folder
from trainer.commands import fetch


@pytest.fixture
def data(tmp_path: Path) -> Path:
    image_folder(tmp_path / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}}, seed=1)
    return tmp_path / "data"


def test_what_a_run_needs_is_found_and_said(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main([f"--data.root={data}", "--model.weights=null"]) == 0
    assert "4 images to train on" in capsys.readouterr().out


def test_a_data_set_known_by_name_is_there_afterwards(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generated: list[str] = []

    def generate(task: str, folder: Path, *, seed: int) -> None:
        generated.append(task)
        image_folder(folder, {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}}, seed=seed)

    monkeypatch.setattr("trainer.data.registry.synthetic.generate", generate)
    words = ["--pretrain.root=synthetic-source", "--data.root=synthetic-target", "--model.weights=null"]
    assert fetch.main([*words, f"--data.cache={tmp_path / 'cache'}"]) == 0
    assert generated == ["target", "source"]
    assert capsys.readouterr().out.count("images to train on") == 2


def test_several_runs_are_looked_at_in_one_start(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    own = [f"--data.root={data}", "--model.weights=null"]
    assert fetch.main([*own, "--next", *own, "--data.val_fraction=0.5"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "4 images to train on, 2 to report on" in said
    assert "2 images to train on, 2 to select the best epoch on" in said
    assert fetch.main([*own, "--next", *own, "--optim.lrr=1"]) == 2


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--optim.lrr=1"], "Did you mean optim.lr?"),
        (["--data.root=/nowhere"], "there is no such folder"),
        (["--model.weights=no.safetensors"], "no.safetensors"),
        (["--model.name=resnet19"], "resnet19"),
        (["--transfer.trainable=layer9"], "'layer9' matches none of this model's"),
        (["--regularization.early_stopping=2"], "set data.val_fraction 0.1"),
        (["--optim.warmup=1000 steps"], "the peak learning rate"),
    ],
)
def test_what_a_run_would_end_with_is_said_before(
    words: list[str], said: str, data: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main([f"--data.root={data}", "--model.weights=null", *words]) == 2
    assert said in capsys.readouterr().err
