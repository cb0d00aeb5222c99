from dataclasses import replace
from pathlib import Path

import pytest

from trainer.config import Config, DataConfig, ModelConfig, RunConfig, SourceConfig
from trainer.errors import UserError
from trainer.stages import resolve

SCRATCH = ModelConfig(name="resnet18", weights=None)
NOBODY = "~nobody-of-this-name/there"


def config(root: str | None, model: ModelConfig = SCRATCH) -> Config:
    return Config(data=DataConfig(root=root), model=model)


@pytest.mark.parametrize("root", [None, "", "  "])
def test_without_a_root_there_is_nothing_to_train_on(root: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set: give the folder of your images"):
        resolve(config(root))


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("data.root", config(NOBODY)),
        ("run.dir", replace(config("images"), run=RunConfig(dir=NOBODY))),
        ("source.root", replace(config("images"), source=SourceConfig(root=NOBODY))),
        ("model.weights", config("images", ModelConfig(name="resnet18", weights=NOBODY))),
        ("model.weights", config("images", ModelConfig(name="resnet18", weights=f"{NOBODY}.safetensors"))),
    ],
)
def test_a_home_folder_that_does_not_exist_is_named(key: str, given: Config) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert str(caught.value).startswith(f"{key} is {NOBODY}")
    assert str(caught.value).endswith("there is no such home folder here: give the whole path")


def test_paths_become_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "w.pth").touch()
    given = Config(
        run=RunConfig(dir="runs/a"),
        data=DataConfig(root="图 片"),
        model=ModelConfig(name="resnet18", weights="~/w.pth"),
    )
    found = resolve(given)
    assert found.run.dir == str(tmp_path / "runs" / "a")
    assert found.data.root == str(tmp_path / "图 片")
    assert found.model.weights == str(tmp_path / "home" / "w.pth")
    sourced = resolve(replace(given, model=SCRATCH, source=SourceConfig(root="~/source")))
    assert sourced.source.root == str(tmp_path / "home" / "source")
    assert resolve(sourced) == sourced, "nothing is left to resolve"


def test_names_stay_names() -> None:
    given = Config(
        data=DataConfig(root="synthetic-target"),
        model=SCRATCH,
        source=SourceConfig(root="synthetic-source"),
    )
    found = resolve(given)
    assert (found.data.root, found.source.root) == ("synthetic-target", "synthetic-source")
    assert resolve(config("images", ModelConfig(name="resnet18"))).model.weights == "DEFAULT"
