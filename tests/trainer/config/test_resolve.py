from pathlib import Path

import pytest

from trainer.config.parse import parse
from trainer.config.resolve import ResolvedConfig, pretrain_config, resolve
from trainer.errors import UserError

UNKNOWN_HOME = "~nobody-of-this-name/there"


def resolved(*options: str) -> ResolvedConfig:
    return resolve(parse(["--data.root=images", "--model.name=resnet18", "--model.weights=null", *options]))


@pytest.mark.parametrize("root", ["null", "", "  "])
def test_data_root_must_be_set(root: str) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set: give the folder of your images"):
        resolved(f"--data.root={root}")


@pytest.mark.parametrize("key", ["data.root", "run.dir", "pretrain.root", "model.weights"])
def test_an_unknown_home_folder_is_refused(key: str) -> None:
    with pytest.raises(UserError) as caught:
        resolved(f"--{key}={UNKNOWN_HOME}")
    assert str(caught.value) == f"{key} is {UNKNOWN_HOME}, and there is no such home folder here: give the whole path"


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "w.pth").touch()
    config = resolved("--run.dir=runs/a", "--data.root=图 片", "--model.weights=~/w.pth")
    paths = (config.run.dir, config.data.root, config.model.weights)
    assert paths == tuple(str(tmp_path / path) for path in ("runs/a", "图 片", "w.pth"))
    config = resolved("--pretrain.root=~/source")
    assert config.pretrain.root == str(tmp_path / "source")
    assert resolve(config) == config


def test_folders_are_relative_to_the_dataset_or_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data/fold_0", "data/here", "here", "held_out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "list.csv").touch()
    folders = ["--data.train_dir=fold_0", "--data.val_dir=data/here", "--data.test_dir=held_out"]
    data = resolved("--data.root=data", *folders).data
    assert (data.train_dir, data.val_dir) == ("fold_0", str(tmp_path / "data/here"))
    assert data.test_dir == str(tmp_path / "held_out")
    table = ["--data.csv_root=here", "--data.csv_columns={path: id}", "--data.csv_suffix=.png"]
    config = resolved("--data.root=data/list.csv", "--pretrain.root=others", *table)
    assert config.data.csv_root == "here"
    pretrain = pretrain_config(config).data
    assert (pretrain.csv_root, pretrain.csv_columns, pretrain.csv_suffix) == (None, {}, None)
    with pytest.raises(UserError, match=r"data\.csv_columns has \['class'\]: expected the keys path, label, split"):
        resolved("--data.root=data", "--data.csv_columns={class: x}")


def test_names_of_data_sets_and_weights_are_unchanged() -> None:
    config = resolved("--data.root=synthetic-target", "--pretrain.root=synthetic-source")
    assert (config.data.root, config.pretrain.root) == ("synthetic-target", "synthetic-source")
    assert resolved("--model.weights=DEFAULT").model.weights == "DEFAULT"


def test_pretraining_has_no_early_stopping_and_no_transfer_options() -> None:
    options = ["--pretrain.root=others", "--transfer.l2_sp=0.1", "--transfer.wise_ft=true"]
    config = resolved(*options, "--regularization.early_stopping=3", "--regularization.ema=0.9")
    pretrain = pretrain_config(config)
    assert (pretrain.regularization.early_stopping, pretrain.regularization.ema) == (None, 0.9)
    assert (pretrain.transfer.l2_sp, pretrain.transfer.wise_ft) == (0, False)
