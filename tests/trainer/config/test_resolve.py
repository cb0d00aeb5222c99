from dataclasses import replace
from pathlib import Path

import pytest

from trainer.config.resolve import pretrain_config, resolve
from trainer.config.schema import (
    Config,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    RegularizationConfig,
    RunConfig,
    TransferConfig,
)
from trainer.errors import UserError

FROM_SCRATCH = ModelConfig(name="resnet18", weights=None)
UNKNOWN_HOME = "~nobody-of-this-name/there"


def make_config(root: str | None, model: ModelConfig = FROM_SCRATCH) -> Config:
    return Config(data=DataConfig(root=root), model=model)


@pytest.mark.parametrize("root", [None, "", "  "])
def test_data_root_must_be_set(root: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set: give the folder of your images"):
        resolve(make_config(root))


@pytest.mark.parametrize(
    ("key", "config"),
    [
        ("data.root", make_config(UNKNOWN_HOME)),
        ("run.dir", replace(make_config("images"), run=RunConfig(dir=UNKNOWN_HOME))),
        ("pretrain.root", replace(make_config("images"), pretrain=PretrainConfig(root=UNKNOWN_HOME))),
        ("model.weights", make_config("images", ModelConfig(name="resnet18", weights=f"{UNKNOWN_HOME}.safetensors"))),
    ],
)
def test_an_unknown_home_folder_is_refused(key: str, config: Config) -> None:
    with pytest.raises(UserError) as caught:
        resolve(config)
    assert str(caught.value).startswith(f"{key} is {UNKNOWN_HOME}")
    assert str(caught.value).endswith("there is no such home folder here: give the whole path")


def test_paths_become_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "home"
    monkeypatch.setenv("HOME", str(home))
    home.mkdir()
    (home / "w.pth").touch()
    config = Config(
        run=RunConfig(dir="runs/a"),
        data=DataConfig(root="图 片"),
        model=ModelConfig(name="resnet18", weights="~/w.pth"),
    )
    resolved = resolve(config)
    assert resolved.run.dir == str(tmp_path / "runs" / "a")
    assert resolved.data.root == str(tmp_path / "图 片")
    assert resolved.model.weights == str(home / "w.pth")
    resolved = resolve(replace(config, model=FROM_SCRATCH, pretrain=PretrainConfig(root="~/source")))
    assert resolved.pretrain.root == str(home / "source")
    assert resolve(resolved) == resolved


def test_folders_are_relative_to_the_dataset_or_to_the_working_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("data/fold_0", "data/here", "here", "held_out"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "data" / "list.csv").touch()
    data = DataConfig(root="data", train_dir="fold_0", val_dir="data/here", test_dir="held_out")
    resolved = resolve(replace(make_config("data"), data=data)).data
    assert (resolved.train_dir, resolved.val_dir) == ("fold_0", str(tmp_path / "data/here"))
    assert resolved.test_dir == str(tmp_path / "held_out")
    table = DataConfig(root="data/list.csv", csv_root="here", csv_columns={"path": "id"}, csv_suffix=".png")
    config = resolve(replace(make_config("data"), data=table, pretrain=PretrainConfig(root="others")))
    assert config.data.csv_root == "here"
    pretrain = pretrain_config(config).data
    assert (pretrain.csv_root, pretrain.csv_columns, pretrain.csv_suffix) == (None, {}, None)
    with pytest.raises(
        UserError, match=r"data\.csv_columns has \['class'\]: expected the keys path, label, split, group"
    ):
        DataConfig(csv_columns={"class": "x"})


def test_names_of_data_sets_and_weights_are_unchanged() -> None:
    config = replace(make_config("synthetic-target"), pretrain=PretrainConfig(root="synthetic-source"))
    resolved = resolve(config)
    assert (resolved.data.root, resolved.pretrain.root) == ("synthetic-target", "synthetic-source")
    assert resolve(make_config("images", ModelConfig(name="resnet18"))).model.weights == "DEFAULT"


def test_pretraining_has_no_early_stopping_and_no_transfer_options() -> None:
    config = replace(
        make_config("images"),
        pretrain=PretrainConfig(root="others"),
        regularization=RegularizationConfig(early_stopping=3, ema=0.9),
        transfer=TransferConfig(l2_sp=0.1, wise_ft=True),
    )
    pretrain = pretrain_config(resolve(config))
    assert (pretrain.regularization.early_stopping, pretrain.regularization.ema) == (None, 0.9)
    assert (pretrain.transfer.l2_sp, pretrain.transfer.wise_ft) == (0, False)
