"""Runs whose output layer is not drawn: what is known before the first step, and what a resume keeps of it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.folders import image_folder
from tests.trainer.test_train_run import back_to, contents, in_folder, rows, train
from trainer.checkpoint import store
from trainer.checkpoint.store import CheckpointId
from trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.pipeline import resolve
from trainer.run.folder import CHECKPOINTS, MODEL

EPOCHS, STEPS = 2, 2


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("starts")
    image_folder(home / "images", {"train": {"ants": 4, "bees": 3}, "val": {"ants": 2, "bees": 1}})
    torch.manual_seed(7)
    save_file(models.squeezenet1_1(num_classes=3).state_dict(), home / "source.safetensors")
    (home / "names").write_text("ant\nbee\ncat\n")
    return home


@pytest.fixture(scope="module", params=["source-labels", "linear-probe"])
def finished(request: pytest.FixtureRequest, home: Path) -> Iterator[tuple[Config, str]]:
    """Return a run that has ended, and what was seen of it."""
    threads = torch.get_num_threads()
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / request.param), device="cpu"),
            data=DataConfig(
                root=str(home / "images"),
                image_size=32,
                num_workers=0,
                cache=str(home / "cache"),
                val_fraction=0.3,
            ),
            model=ModelConfig(
                name="squeezenet1_1",
                weights=str(home / "source.safetensors"),
                head_init=request.param,
                source_labels=str(home / "names"),
                dropout=0.3,
            ),
            train=TrainConfig(epochs=EPOCHS, batch_size=3, precision="fp32", logs_per_epoch=1),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    _, seen = train(config)
    yield config, seen
    torch.set_num_threads(threads)


def test_the_accuracy_before_the_first_step_is_shown_and_written(finished: tuple[Config, str]) -> None:
    config, seen = finished
    start, *others = rows(config)
    assert (start["kind"], start["epoch"], start["step"]) == ("start", 0, 0)
    assert [row["kind"] for row in others] == ["train", "epoch"] * EPOCHS
    assert (start["test_seen"], start["val_seen"]) == (3, 2)
    low, high = start["test_interval"]
    assert 0 <= low <= start["test_accuracy"] == start["test_correct"] / 3 <= high <= 1
    assert f"before the first step: val accuracy {start['val_accuracy']:.3f} (95 % interval" in seen
    assert f"test accuracy {start['test_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}" in seen
    assert seen.count("linear probe: one pass over the 5 training images") == (
        config.model.head_init == "linear-probe"
    )


def test_a_resumed_run_has_the_checkpoints_head_and_makes_no_second_pass(
    finished: tuple[Config, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, _ = finished
    shutil.copytree(original.run.dir, tmp_path / "run")
    config = in_folder(original, tmp_path / "run")
    back_to(config, 1, 0)
    monkeypatch.setattr("trainer.train_run.probe_head", lambda *_, **__: pytest.fail("a second pass"))
    outcome, seen = train(config)
    assert "before the first step" not in seen
    assert [row["epoch"] for row in outcome.rows] == [1, 2], "the start is no epoch"
    last = Path(CHECKPOINTS) / CheckpointId(EPOCHS * STEPS, EPOCHS).name
    for name in (MODEL, last / store.MODEL, last / store.OPTIMIZER):
        a, b = (load_file(Path(run.run.dir) / name) for run in (config, original))
        assert all(torch.equal(a[key], b[key]) for key in a | b), name
    assert rows(config) == rows(original)
    # Of the finished run nothing is made again.
    before = contents(tmp_path / "run")
    train(config)
    assert contents(tmp_path / "run") == before


def test_a_run_killed_before_its_first_checkpoint_finds_the_same_head(
    finished: tuple[Config, str], tmp_path: Path
) -> None:
    original, _ = finished
    config = in_folder(original, tmp_path / "run")
    train(config)
    first = Path(CHECKPOINTS) / CheckpointId(1, 0).name / store.MODEL
    a, b = (load_file(Path(run.run.dir) / first) for run in (config, original))
    assert all(torch.equal(a[key], b[key]) for key in a | b)
    assert rows(config)[0] == rows(original)[0]
