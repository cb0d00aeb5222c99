from collections.abc import Callable
from pathlib import Path

import pytest

from tests.folders import image_folder
from trainer.commands import fetch

Options = Callable[..., list[str]]


def test_named_datasets_are_generated(
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


def test_several_runs_are_checked_in_one_process(options: Options, capsys: pytest.CaptureFixture[str]) -> None:
    assert fetch.main([*options(), "--next", *options(data__val_fraction=0.5)]) == 0
    summary = " ".join(capsys.readouterr().out.split())
    assert "6 images to train on, 4 to report on" in summary
    assert "3 images to train on, 3 to select the best epoch on" in summary
    assert fetch.main([*options(), "--next", *options(), "--optim.lrr=1"]) == 2


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--optim.lrr=1", "Did you mean --optim.lr 1?"),
        ("--data.root=/nowhere", "there is no such folder"),
        ("--model.weights=no.safetensors", "no.safetensors"),
        ("--transfer.trainable=layer9", "'layer9' matches no"),
        ("--regularization.early_stopping=2", "set data.val_fraction 0.1"),
        ("--optim.warmup=1000 steps", "the peak learning rate"),
    ],
)
def test_errors_of_a_run_are_reported_before_it_starts(
    word: str, message: str, options: Options, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fetch.main([*options(), word]) == 2
    assert message in capsys.readouterr().err
