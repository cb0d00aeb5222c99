"""Runs that compute what frozen layers give once equal runs that compute it in every step."""

import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from regraft.contract import MODEL
from tests.folders import image_folder
from tests.trainer.phases import assert_equal_runs, copy_run, in_folder, rewind, rows, train, with_options
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.distributed.signals import Stopped
from trainer.run.session import OpenRun

EPOCHS, SIZE = 3, 32
Sections = dict[str, dict[str, Any]]
RUNS: dict[str, tuple[str, Sections]] = {
    "stage4": ("shufflenet_v2_x0_5", {
        "transfer": {"trainable": "from:stage4"}, "optim": {"name": "adamw"}, "train": {"grad_accum_steps": 2},
    }),
    "stages": ("squeezenet1_1", {
        "transfer": {"trainable": {0: "head", 1: "from:features.12", 2: "all"}, "l2_sp": 0.1},
        "model": {"head_init": "linear-probe"}, "run": {"audit": True}, "optim": {"lr": 1e-3},
    }),
    "views": ("mobilenet_v3_small", {
        "transfer": {"trainable": "last:3", "wise_ft": True},
        "data": {"augment": "basic", "random_erasing": 0.5, "views": 2, "sampling": "balanced"},
        "regularization": {"ema": 0.9, "label_smoothing": 0.1},
    }),
}  # fmt: skip
PASSES = {"stage4": 1, "stages": 2, "views": 2}
"""Passes over the training images."""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    splits = {"train": {"a": 6, "b": 3}, "val": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}}
    return image_folder(tmp_path_factory.mktemp("images"), splits)


@pytest.fixture(scope="module", params=RUNS)
def cached(
    request: pytest.FixtureRequest, images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, ResolvedConfig, str]:
    """Return the name of a run, its config, and what it printed. It is finished."""
    folder, (model, sections) = tmp_path_factory.mktemp(request.param), RUNS[request.param]
    torch.manual_seed(11)
    save_file(models.get_model(model).state_dict(), folder / "source.safetensors")
    defaults: Sections = {
        "run": {"dir": str(folder / "run"), "device": "cpu"},
        "data": {"root": str(images), "image_size": SIZE, "num_workers": 0, "augment": "none"},
        "model": {"name": model, "weights": str(folder / "source.safetensors")},
        "optim": {"lr": 0.01, "schedule": "constant"},
        "train": {"epochs": EPOCHS, "batch_size": 4, "precision": "fp32", "logs_per_epoch": 3},
        "checkpoint": {"every": "1 steps", "keep_last": 100},
    }
    merged = {name: {**defaults.get(name, {}), **sections.get(name, {})} for name in {**defaults, **sections}}
    config = resolve(with_options(Config(), **merged))
    return request.param, config, train(config)[1]


def test_losses_and_weights_are_those_without_the_cache(
    cached: tuple[str, ResolvedConfig, str], tmp_path: Path
) -> None:
    name, config, printed = cached
    plain = with_options(in_folder(config, tmp_path / "plain"), train={"cache_features": "off"})
    _, plain_printed = train(plain)
    assert printed.count(" computed in ") == PASSES[name]
    assert "frozen layers" not in plain_printed
    for row, other in zip(rows(config), rows(plain), strict=True):
        losses = {key for key in row if key.endswith("_loss")}
        assert {key: row[key] for key in losses} == pytest.approx({key: other[key] for key in losses}, rel=1e-5)
        assert row | dict.fromkeys(losses) == other | dict.fromkeys(losses)
    tensors, others = (load_file(Path(one.run.dir) / MODEL) for one in (config, plain))
    for key, tensor in tensors.items():
        torch.testing.assert_close(tensor, others[key], rtol=1e-4, atol=1e-6)


def test_a_resumed_run_is_bit_identical(cached: tuple[str, ResolvedConfig, str], tmp_path: Path) -> None:
    _, config, _ = cached
    resumed = copy_run(config, tmp_path / "resumed")
    rewind(resumed, 4, 1)
    train(resumed)
    assert_equal_runs(resumed, config)


def test_a_signal_stops_the_pass_and_the_run_resumes(cached: tuple[str, ResolvedConfig, str], tmp_path: Path) -> None:
    name, config, _ = cached
    again = in_folder(config, tmp_path / "stopped")

    def receive_signal(run: OpenRun) -> None:
        run.signals.received = signal.SIGTERM

    with pytest.raises(Stopped) as stopped:
        train(again, before=receive_signal)
    assert stopped.value.saved == f"step 0 of {3 * EPOCHS}, in epoch 1 of {EPOCHS}"
    if name == "stages":
        train(again)
        assert_equal_runs(again, config)
