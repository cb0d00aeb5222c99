"""Runs whose frozen weights are stored in bfloat16 (train.frozen_dtype)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from regraft.contract import CHECKPOINTS, MODEL
from tests.folders import image_folder
from tests.trainer.phases import assert_equal_runs, copy_run, rewind, rows, train, with_options
from trainer.checkpoint import store
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.config.sections.train import TrainConfig
from trainer.errors import UserError

NAME = "squeezenet1_1"


def make_config(folder: Path, trainable: dict[int, str] | str, **regularization: float) -> ResolvedConfig:
    torch.manual_seed(11)
    save_file(models.get_model(NAME).state_dict(), folder / "source.safetensors")
    images = image_folder(folder / "images", {"train": {"a": 5, "b": 3}, "val": {"a": 2, "b": 2}})
    return resolve(
        with_options(
            Config(),
            run={"dir": str(folder / "run"), "device": "cpu"},
            data={"root": str(images), "image_size": 32, "num_workers": 0},
            model={"name": NAME, "weights": str(folder / "source.safetensors")},
            transfer={"trainable": trainable},
            optim={"lr": 0.02, "name": "adamw"},
            regularization=regularization,
            train={"epochs": 3, "batch_size": 4, "precision": "bf16", "frozen_dtype": "bfloat16"},
            checkpoint={"every": "1 steps", "keep_last": 100},
        )
    )


@pytest.mark.parametrize("cache_features", ["auto", "off"])
def test_updates_are_the_same_and_files_hold_the_rounded_weights_in_float32(
    cache_features: str, tmp_path: Path
) -> None:
    config = make_config(tmp_path, "from:features.12")
    config = with_options(
        config, train={"cache_features": cache_features}, data={"views": 1 if cache_features == "auto" else None}
    )
    other = with_options(config, run={"dir": str(tmp_path / "float32")}, train={"frozen_dtype": "float32"})
    train(config)
    train(other)
    assert rows(config) == rows(other)
    saved, expected = (load_file(Path(run.run.dir) / MODEL) for run in (config, other))
    frozen = [f"features.{number}." for number in range(12)]
    assert saved.keys() == expected.keys()
    for name, tensor in saved.items():
        assert tensor.dtype == torch.float32
        is_frozen = name.startswith(tuple(frozen))
        stored = expected[name].bfloat16().float() if is_frozen else expected[name]
        assert torch.equal(tensor, stored), name
        assert torch.equal(tensor, expected[name]) != is_frozen or not tensor.any()


def test_a_resumed_run_with_gradual_unfreezing_is_bit_identical(tmp_path: Path) -> None:
    config = make_config(tmp_path, {0: "head", 1: "from:features.12", 2: "all"}, ema=0.9)
    train(config)
    checkpoints = store.list_checkpoints(tmp_path / "run" / CHECKPOINTS)
    positions = [(checkpoint.step, checkpoint.epoch) for checkpoint in checkpoints]
    assert len(positions) == 6
    for step, epoch in positions[1:]:  # the first one is the last of the run
        resumed = copy_run(config, tmp_path / f"resumed-{step}")
        rewind(resumed, step, epoch)
        train(resumed)
        assert_equal_runs(resumed, config)


def test_another_precision_is_an_error() -> None:
    with pytest.raises(UserError, match=r"train.precision is auto: expected precision bf16"):
        TrainConfig(frozen_dtype="bfloat16")
