"""Runs whose output layer starts from the source's classes or from a linear probe."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from tests.folders import image_folder
from tests.trainer.phases import assert_equal_runs, copy_run, rewind, rows, train
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig


@pytest.fixture(scope="module", params=["source-labels", "linear-probe"])
def finished(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[ResolvedConfig, str]:
    """Return a finished run, and what it printed."""
    home = tmp_path_factory.mktemp(request.param)
    image_folder(home / "images", {"train": {"ants": 4, "bees": 3}, "val": {"ants": 2, "bees": 1}})
    torch.manual_seed(7)
    save_file(models.squeezenet1_1(num_classes=3).state_dict(), home / "source.safetensors")
    (home / "names").write_text("ant\nbee\ncat\n")
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(home / "images"), image_size=32, num_workers=0, cache=str(home), val_fraction=0.3),
            model=ModelConfig(
                name="squeezenet1_1",
                weights=str(home / "source.safetensors"),
                head_init=request.param,
                source_labels=str(home / "names"),
                dropout=0.3,
            ),
            train=TrainConfig(epochs=2, batch_size=3, precision="fp32", logs_per_epoch=1),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    _, printed = train(config)
    return config, printed


def test_the_accuracy_before_the_first_step_is_logged(finished: tuple[ResolvedConfig, str]) -> None:
    config, printed = finished
    start, *others = rows(config)
    assert (start["kind"], start["epoch"], start["step"]) == ("start", 0, 0)
    assert [row["kind"] for row in others] == ["train", "epoch"] * 2
    assert (start["test_seen"], start["val_seen"]) == (3, 2)
    low, high = start["test_interval"]
    assert 0 <= low <= start["test_accuracy"] == start["test_correct"] / 3 <= high <= 1
    assert f"before the first step: val accuracy {start['val_accuracy']:.3f} (95 % interval" in printed
    assert f"test accuracy {start['test_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}" in printed
    is_probe = config.model.head_init == "linear-probe"
    assert printed.count("linear probe: one pass over the 5 training images") == is_probe


def test_a_resumed_run_makes_no_second_pass(
    finished: tuple[ResolvedConfig, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _ = finished
    config = copy_run(original, tmp_path / "run")
    rewind(config, 1, 0)
    monkeypatch.setattr("trainer.train_run.fit_linear_probe", lambda *_, **__: pytest.fail("a second pass"))
    result, printed = train(config)
    assert "before the first step" not in printed
    assert [row["epoch"] for row in result.rows] == [1, 2]
    assert_equal_runs(config, original)
