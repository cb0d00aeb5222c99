"""Wrong weights end a run before its images are decoded."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from regraft.contract import CHECKPOINTS
from trainer.checkpoint.state import CheckpointId
from trainer.config.schema import Config
from trainer.config.sections.data import DataConfig
from trainer.config.sections.model import ModelConfig
from trainer.config.sections.pretrain import PretrainConfig
from trainer.config.sections.run import RunConfig
from trainer.config.start import start
from trainer.errors import UserError

NAME = "shufflenet_v2_x0_5"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), device="cpu", threads=1),
        data=DataConfig(root=str(tmp_path / "images"), image_size=32),
        model=ModelConfig(name=NAME, weights=str(tmp_path / "weights")),
    )


def write_weights(folder: Path, kind: str) -> None:
    path, state = folder / "weights", models.get_model(NAME, weights=None).state_dict()
    saved: dict[str, Any] = {
        "another architecture": models.squeezenet1_1().state_dict(),
        "partial": {name: tensor for name, tensor in state.items() if not name.startswith("conv5.")},
        "code": {"model": state, "args": eval},
        "two models": {f"one.{k}": v for k, v in state.items()} | {f"two.{k}": v + 1 for k, v in state.items()},
    }
    if kind in saved:
        torch.save(saved[kind], path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "shards":
        path.mkdir()
        index = {"weight_map": {"conv1.0.weight": "../../outside.safetensors"}}
        (path / "model.safetensors.index.json").write_text(json.dumps(index))
    elif kind == "table":
        path.write_text("path,label\n")
    elif kind != "missing":
        torch.save(state, path) if kind == "cut torch" else save_file(state, path)
        path.write_bytes(path.read_bytes()[:-9000])


WRONG = {
    "missing": "there is no such weights file",
    "folder": "a folder without weights",
    "shards": "is not the name of a file beside it",
    "table": "not a weights file .*path,label",
    "cut torch": "not a readable torch file",
    "cut safetensors": "not a readable safetensors file",
    "code": "contains more than plain tensors",
    "two models": "contains several models: one, two",
    "another architecture": f"no tensor in .* fits {NAME}.*The file contains a squeezenet1_1",
    "partial": f"does not fit {NAME}: 5 of the backbone's 335 tensors differ.*5 missing: conv5.0.weight",
}


@pytest.mark.parametrize("kind", WRONG)
def test_wrong_weights_are_told_before_the_images_are_looked_for(kind: str, tmp_path: Path, config: Config) -> None:
    write_weights(tmp_path, kind)
    began = time.monotonic()
    with pytest.raises(UserError, match=f"(?s){WRONG[kind]}"):
        start(config)
    assert time.monotonic() - began < 20, "without reading the values"
    assert not (tmp_path / "run").exists()
    if kind == "partial":
        start(replace(config, model=replace(config.model, allow_partial_weights=True)))
    if kind == "two models":
        start(replace(config, model=replace(config.model, weights_key="two")))


def test_weights_that_a_run_does_not_read_are_not_checked(tmp_path: Path, config: Config) -> None:
    start(replace(config, model=replace(config.model, weights=None), pretrain=PretrainConfig(root="synthetic-source")))
    (tmp_path / "run" / CHECKPOINTS / CheckpointId(3, 1).name).mkdir(parents=True)
    start(config)
    with pytest.raises(UserError, match="there is no such weights file"):
        start(replace(config, run=replace(config.run, resume="never")))
