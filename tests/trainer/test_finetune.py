import errno
import io
import os
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from tests.folders import image_folder
from trainer import runtime
from trainer.config import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.data.augment import Preprocessing
from trainer.errors import UserError
from trainer.finetune import Outcome, Saver, finetune
from trainer.loop import Progress
from trainer.meter import Figures
from trainer.model_file import Description
from trainer.report.metrics import MetricsFile, read_rows
from trainer.run_folder import LAST, METRICS
from trainer.stages import resolve

EPOCHS = 3


def train(config: Config) -> tuple[Outcome, str]:
    """Return what came of a run, and what was seen of it."""
    screen = io.StringIO()
    machine = runtime.start(device="cpu", precision="fp32", threads=1)
    outcome = finetune(config, machine, Console(file=screen, width=100, soft_wrap=True), weights=None)
    return outcome, screen.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Return the config of a run that has ended."""
    home = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    root = image_folder(home / "images", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(root), image_size=32, workers=0, cache=str(home / "cache")),
            model=ModelConfig(name="squeezenet1_1", weights=None),
            train=TrainConfig(epochs=EPOCHS, batch_size=4, precision="fp32"),
        )
    )
    train(config)
    yield config
    torch.set_num_threads(threads)


@pytest.fixture
def copy(finished: Config, tmp_path: Path) -> Config:
    """Return the config of a copy of that run, to be damaged."""
    shutil.copytree(finished.run.dir, tmp_path / "run")
    return replace(finished, run=replace(finished.run, dir=str(tmp_path / "run")))


def without_epoch(path: Path, epoch: int) -> None:
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(line for line in lines if f'"kind": "epoch", "epoch": {epoch},' not in line))
    assert len(path.read_text().splitlines()) == len(lines) - 1


def test_a_finished_run_is_only_reported(copy: Config) -> None:
    before = {path.name: path.read_bytes() for path in Path(copy.run.dir).iterdir()}
    outcome, seen = train(copy)
    assert f"finished already, after epoch {EPOCHS}" in seen
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3]
    after = {path.name: path.read_bytes() for path in Path(copy.run.dir).iterdir()}
    assert after.keys() == before.keys()
    assert {name for name in after if after[name] != before[name]} <= {"config.yaml"}, "which holds run.dir"


@pytest.mark.parametrize("epoch", [1, 2, 3])
def test_a_run_is_not_gone_on_with_if_rows_are_missing(epoch: int, copy: Config) -> None:
    path = Path(copy.run.dir) / METRICS
    without_epoch(path, epoch)
    before = path.read_bytes()
    with pytest.raises(UserError, match=f"lacks epoch {epoch}, but the training state is that after epoch 3"):
        train(copy)
    assert path.read_bytes() == before


def test_the_rows_of_a_run_that_has_lost_its_state_are_not_written_over(copy: Config) -> None:
    folder = Path(copy.run.dir)
    (folder / LAST).unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.yaml"}
    with pytest.raises(UserError, match="goes on to epoch 3, but there is no training state"):
        train(copy)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "config.yaml"} == before


def test_a_run_killed_before_its_first_state_starts_anew(copy: Config) -> None:
    folder = Path(copy.run.dir)
    (folder / LAST).unlink()
    for epoch in (2, 3):
        without_epoch(folder / METRICS, epoch)
    outcome, _ = train(copy)
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3]
    assert [row["epoch"] for row in read_rows(folder / METRICS) if row["kind"] == "epoch"] == [1, 2, 3]


@pytest.mark.parametrize("full_at", ["write_model", "save_state"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_saved(
    full_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    metrics = MetricsFile(tmp_path / METRICS, keep_epochs=0)
    model = torch.nn.Linear(2, 2)
    save = Saver(
        folder=tmp_path,
        model=model,
        optimizer=torch.optim.SGD(model.parameters()),
        scaler=None,
        fingerprint="x",
        selection=None,
        description=Description(
            version="0",
            architecture="resnet18",
            classes=("a", "b"),
            preprocessing=Preprocessing(
                image_size=8,
                resize_size=8,
                resize="squash",
                interpolation="bilinear",
                mean=(0.5, 0.5, 0.5),
                std=(0.5, 0.5, 0.5),
            ),
            source="",
            metrics={},
        ),
    )
    figures = Figures(loss_sum=1.0, correct=1, seen=1, seconds=1.0, compute_seconds=1.0, bad_step=None)
    for epoch in (1, 2):
        metrics.append({"kind": "epoch", "epoch": epoch, "test_accuracy": epoch / 2, "test_loss": 1.0})
        progress = Progress(epoch=epoch, epoch_step=1, step=epoch, figures=figures, lr={})
        if epoch == 1:
            save(progress, {})
            before = {path.name: path.read_bytes() for path in tmp_path.glob("*.safetensors")}

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(
        f"trainer.{'model_file' if full_at == 'write_model' else 'checkpoint'}.save_file", full
    )
    with pytest.raises(UserError, match=r"epoch 2 could not be saved .*No space left.*make room"):
        save(progress, {})
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != METRICS}
    assert after["last.safetensors"] == before["last.safetensors"]
    assert after.keys() == before.keys(), "no temporary file is left"
