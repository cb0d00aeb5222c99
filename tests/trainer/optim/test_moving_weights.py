"""Runs with a moving average, L2-SP, early stopping and WiSE-FT: what they leave, and where they go on."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torchvision import models

from tests.folders import image_folder
from tests.trainer.test_train_run import back_to, in_folder, rows, train
from trainer.checkpoint import store
from trainer.checkpoint.store import CheckpointId
from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RegularizationConfig,
    RunConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.errors import UserError
from trainer.model.metadata import read_metadata, write_model
from trainer.pipeline import resolve
from trainer.report.metrics import Row
from trainer.report.summary import best_row
from trainer.run.folder import CHECKPOINTS, FINE_TUNED, MODEL, START, WISE
from trainer.run.lock import ATTEMPTS, read_attempts
from trainer.transfer.wise_ft import interpolate

pytestmark = pytest.mark.slow
EPOCHS, STEPS = 3, 2
PULL = 0.5


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Return the config of a run that has ended, of a model with BatchNorm and dropout."""
    home, threads = tmp_path_factory.mktemp("moving"), torch.get_num_threads()
    torch.manual_seed(11)
    source = models.mobilenet_v3_small()
    save_file(source.state_dict(), home / "source.safetensors")
    parts = {"train": {"a": 4, "b": 3}, "val": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}}
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(image_folder(home / "images", parts)), image_size=32, num_workers=0),
            model=ModelConfig(name="mobilenet_v3_small", weights=str(home / "source.safetensors")),
            transfer=TransferConfig(l2_sp=PULL, wise_ft=True, batch_norm="train"),
            optim=OptimConfig(lr=0.02, head_lr_scale=1.0, schedule="constant"),
            regularization=RegularizationConfig(ema=0.9, early_stopping=9),
            train=TrainConfig(epochs=EPOCHS, batch_size=4, precision="fp32", logs_per_epoch=2),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    run(config)
    yield config
    torch.set_num_threads(threads)


def run(config: Config) -> tuple[tuple[Row, ...], str]:
    outcome, seen = train(config, weights=config.model.weights)
    return outcome.rows, seen


@pytest.fixture
def copy(finished: Config, tmp_path: Path) -> Config:
    """Return the config of a copy of that run, to be damaged."""
    shutil.copytree(finished.run.dir, tmp_path / "run")
    return in_folder(finished, tmp_path / "run")


def tensors(config: Config, place: tuple[int, int], name: str) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / CHECKPOINTS / CheckpointId(*place).name / name)


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def assert_equal_runs(one: Config, other: Config) -> None:
    """Check that two runs have come to the same, bit for bit."""
    for name in (store.MODEL, store.OPTIMIZER, store.AVERAGE):
        last = (EPOCHS * STEPS, EPOCHS)
        assert same(tensors(one, last, name), tensors(other, last, name)), name
    a, b = Path(one.run.dir), Path(other.run.dir)
    assert same(load_file(a / MODEL), load_file(b / MODEL))
    assert (a / WISE).read_text() == (b / WISE).read_text()
    assert same(load_file(a / START), load_file(b / START))
    assert (a / FINE_TUNED).exists() == (b / FINE_TUNED).exists()
    assert rows(one) == rows(other)


def fine_tuned(folder: Path) -> Path:
    return folder / (FINE_TUNED if (folder / FINE_TUNED).exists() else MODEL)


def test_the_average_is_what_is_evaluated_and_what_the_model_file_holds(finished: Config) -> None:
    folder = Path(finished.run.dir)
    best = best_row([row for row in rows(finished) if row["kind"] == "epoch"], "val")
    place = (best["step"], best["epoch"])
    average, live = (tensors(finished, place, name) for name in (store.AVERAGE, store.MODEL))
    held = load_file(fine_tuned(folder))
    assert same(held, average)
    differing = {name for name in live if not torch.equal(live[name], average[name])}
    assert differing == {name for name in live if not name.endswith("num_batches_tracked")}


def test_the_line_begins_with_the_model_before_its_first_update(finished: Config) -> None:
    start, source = load_file(Path(finished.run.dir) / START), load_file(str(finished.model.weights))
    assert start["classifier.3.weight"].shape[0] == 2
    others = [name for name in start if not name.startswith("classifier.3.")]
    assert all(torch.equal(start[name], source[name]) for name in others)


def test_the_model_file_is_the_best_point_of_the_line(finished: Config) -> None:
    folder = Path(finished.run.dir)
    said = json.loads((folder / WISE).read_text())
    assert [point["alpha"] for point in said["points"]] == [tenths / 10 for tenths in range(11)]
    scores = {point["alpha"]: (point["accuracy"], -point["loss"]) for point in said["points"]}
    assert scores[said["alpha"]] == max(scores.values())
    found = [row for row in rows(finished) if row["kind"] == "epoch"]
    best = best_row(found, "val")
    assert said["val_accuracy_of_fine_tuned"] == best["val_accuracy"], "of the end, what the run has found"
    assert said["val_loss_of_fine_tuned"] == pytest.approx(best["val_loss"], rel=1e-6)
    start, tuned, kept = (load_file(path) for path in (folder / START, fine_tuned(folder), folder / MODEL))
    for name, tensor in kept.items():
        if tensor.is_floating_point():
            wanted = (1 - said["alpha"]) * start[name].double() + said["alpha"] * tuned[name].double()
            torch.testing.assert_close(tensor.double(), wanted, rtol=1e-5, atol=1e-6)
        else:
            assert torch.equal(tensor, tuned[name])


@pytest.mark.parametrize("place", [(1, 0), (4, 2)], ids=lambda place: f"step {place[0]}")
def test_a_run_that_was_killed_goes_on_to_the_same_average_pull_and_line(
    place: tuple[int, int], copy: Config, finished: Config
) -> None:
    # Anchors that were taken from the checkpoint would pull elsewhere: by step 4 the weights have moved.
    back_to(copy, *place)
    _, seen = run(copy)
    assert f"(step {place[0]})" in seen
    assert_equal_runs(copy, finished)


def test_a_finished_run_evaluates_the_line_only_if_that_was_not_done(copy: Config, finished: Config) -> None:
    folder = Path(copy.run.dir)

    def contents() -> dict[str, bytes]:
        files = [p for p in folder.rglob("*") if p.is_file() and p.parent.name != ATTEMPTS]
        return {str(p.relative_to(folder)): p.read_bytes() for p in files if p.name != "config.yaml"}

    before = contents()
    _, seen = run(copy)
    assert "finished already" in seen
    assert "alpha" not in seen
    assert contents() == before
    (folder / WISE).unlink()  # as a kill leaves it that came before the end
    _, seen = run(copy)
    assert "alpha" in seen
    assert contents() == before, "from the best epoch's own weights, wherever they stand by now"
    assert_equal_runs(copy, finished)


def test_a_run_that_is_made_longer_goes_on_from_the_best_epochs_weights_and_evaluates_the_line_anew(
    copy: Config,
) -> None:
    folder = Path(copy.run.dir)
    described = read_metadata(folder / MODEL)
    assert described is not None
    # As where another point has won.
    tuned = load_file(fine_tuned(folder))
    write_model(folder / FINE_TUNED, tuned, described)
    moved = replace(described, metrics={**described.metrics, "wise_ft": {"alpha": 0.5}})
    write_model(folder / MODEL, interpolate(load_file(folder / START), tuned, 0.5), moved)
    (folder / WISE).write_text('{"alpha": 0.5}')

    found, seen = run(replace(copy, train=replace(copy.train, epochs=EPOCHS + 1)))
    assert "going on after epoch 3 of 4" in seen
    assert "alpha" in seen
    assert len(json.loads((folder / WISE).read_text())["points"]) == 11
    best = best_row(found, "val")
    average = tensors(copy, (best["step"], best["epoch"]), store.AVERAGE)
    assert same(load_file(fine_tuned(folder)), average), "never a point of the earlier line"


def test_without_its_start_the_line_is_refused_with_a_sentence(copy: Config) -> None:
    folder = Path(copy.run.dir)
    (folder / START).unlink()
    (folder / WISE).unlink()
    with pytest.raises(UserError, match=r"start\.safetensors is gone, and transfer\.wise_ft needs it"):
        run(copy)
    back_to(copy, 3, 1)
    with pytest.raises(UserError, match=r"start\.safetensors is gone"):
        run(copy)


def test_a_checkpoint_without_the_average_is_refused_with_a_sentence(copy: Config) -> None:
    back_to(copy, 3, 1)
    path = Path(copy.run.dir) / CHECKPOINTS / CheckpointId(3, 1).name
    manifest = json.loads((path / store.MANIFEST).read_text())
    del manifest["files"][store.AVERAGE]
    (path / store.AVERAGE).unlink()
    (path / store.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"holds no moving average of the weights: it was saved without"):
        run(copy)


# --- early stopping


@pytest.fixture(scope="module")
def stubborn(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the config of a run that learns nothing: its first epoch is its best."""
    home = tmp_path_factory.mktemp("stubborn")
    parts = {"train": {"a": 4, "b": 3}, "val": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}}
    return resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(image_folder(home / "images", parts)), image_size=32, num_workers=0),
            model=ModelConfig(name="squeezenet1_1", weights=None),
            optim=OptimConfig(lr=1e-30, weight_decay=0.0),
            regularization=RegularizationConfig(early_stopping=2),
            train=TrainConfig(epochs=9, batch_size=4, precision="fp32", logs_per_epoch=1),
        )
    )


def test_a_run_that_does_not_get_better_is_over_and_stays_so(stubborn: Config, tmp_path: Path) -> None:
    config = in_folder(stubborn, tmp_path / "run")
    found, seen = run(config)
    assert [row["epoch"] for row in found] == [1, 2, 3]
    assert "stopped early, after epoch 3 of 9: none of the last 2 was better on val than epoch 1" in seen
    assert store.list_checkpoints(tmp_path / "run" / CHECKPOINTS)[0] == CheckpointId(6, 3)
    assert read_epoch(tmp_path / "run") == 1

    found, seen = run(config)
    assert "finished already: stopped early, after epoch 3 of 9" in seen
    assert [row["epoch"] for row in found] == [1, 2, 3]
    (tmp_path / "run" / MODEL).rename(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="is gone, and the run is finished"):
        run(config)
    (tmp_path / "elsewhere").rename(tmp_path / "run" / MODEL)

    with pytest.raises(UserError, match=r"regularise\.early_stopping: 2 there, 1 now"):
        run(with_patience(config, 1))
    found, seen = run(with_patience(config, 3))
    assert "going on after epoch 3 of 9" in seen
    assert "stopped early, after epoch 4 of 9: none of the last 3" in seen
    assert [row["epoch"] for row in found] == [1, 2, 3, 4]
    states = [(r.state, r.step, r.steps, r.epoch, r.epochs) for r in read_attempts(tmp_path / "run")]
    assert states[:2] == [("done", 6, 6, 3, 3)] * 2
    assert states[-1] == ("done", 8, 8, 4, 4)


def with_patience(config: Config, patience: int | None) -> Config:
    return replace(config, regularization=replace(config.regularization, early_stopping=patience))


def read_epoch(folder: Path) -> Any:
    described = read_metadata(folder / MODEL)
    assert described is not None
    return described.metrics["epoch"]


@pytest.mark.parametrize("asked", ["early_stopping", "wise_ft"])
def test_without_images_to_select_on_it_is_refused_before_the_model_is_made(
    asked: str, finished: Config, tmp_path: Path
) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}})
    config = in_folder(finished, tmp_path / "run")
    config = replace(
        config,
        data=replace(config.data, root=str(root)),
        transfer=replace(config.transfer, wise_ft=asked == "wise_ft"),
        regularization=RegularizationConfig(early_stopping=3 if asked == "early_stopping" else None),
    )
    with pytest.raises(UserError, match=rf"{asked}.* no images to select on .*set data\.val_fraction 0\.1"):
        run(config)
