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
