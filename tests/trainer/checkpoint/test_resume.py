"""`ResumePoint`: find, check, restore and describe the newest checkpoint of a run."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from regraft.contract import CHECKPOINTS, CONFIG, METRICS, MODEL
from tests.trainer.checkpoint.checkpoints import METADATA, contents, make_state
from tests.trainer.runs import make_run, printed, stop_heartbeat
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.resume import ResumePoint
from trainer.checkpoint.state import CheckpointId
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError
from trainer.optim.ema import ModelEma
from trainer.optim.schedule import TrainSchedule
from trainer.run.folder import write_config
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun
from trainer.run.versions import versions
from trainer.state import TrainState

STEPS = 2
SAVED = dataclasses.replace(METADATA, steps_per_epoch=STEPS, schedule={"total_steps": 8}, versions=versions(), seed=3)
CONFIG_TEXT = "run:\n  seed: 3\ntrain:\n  epochs: 4\n"


def digest(epoch: int) -> str:
    return f"order of epoch {epoch}"


def make_training_state(width: int = 2) -> TrainState:
    model = nn.Linear(3, width)
    return TrainState(model=model, optimizer=torch.optim.SGD(model.parameters()), ema=ModelEma(model, None))


class Saved:
    """A run folder with checkpoints, and the open run of another start."""

    def __init__(self, run: OpenRun) -> None:
        self.run, self.folder = run, run.folder
        write_config(self.folder, CONFIG_TEXT)

    def save(self, step: int, epoch: int, *, metrics: str = "", **changes: Any) -> Path:
        """Write a checkpoint; `changes` are fields of its state."""
        (self.folder / MODEL).write_text("the best")
        fields = {"run": SAVED, "order_digest": digest(epoch), "scaler": {}} | changes
        files = store.to_files(make_training_state().state_dict(), {})
        files |= {store.STATE: make_state(step, epoch, **fields).to_json(), store.METRICS: metrics.encode()}
        checkpoint = CheckpointId(step, epoch)
        store.write(self.folder / CHECKPOINTS, checkpoint, files, check=lambda: None)
        return self.folder / CHECKPOINTS / checkpoint.name

    def resume_point(
        self, *, epochs: int = 4, steps: int = STEPS, patience: int | None = None, **changes: Any
    ) -> ResumePoint:
        sizes = (4,) * steps
        schedule = TrainSchedule(batch_sizes=sizes, epochs=epochs, logs_per_epoch=1, lr_multiplier=lambda step: 1.0)
        options: dict[str, Any] = {"metadata": SAVED, "config": CONFIG_TEXT, "order_digest": digest} | changes
        return ResumePoint(self.run, schedule, early_stopping=EarlyStopping(split="val", patience=patience), **options)

    def refusal(self, **options: Any) -> str:
        """Return why the run cannot be resumed. Nothing in its folder may change."""
        before = contents(self.folder)
        with pytest.raises(UserError) as caught:
            self.resume_point(**options)
        assert before == contents(self.folder)
        return str(caught.value)


@pytest.fixture
def saved(tmp_path: Path, ctx: DistributedContext) -> Iterator[Saved]:
    lock = RunLock.acquire(tmp_path, log=print)
    yield Saved(make_run(tmp_path, ctx, lock))
    stop_heartbeat(lock)


def test_leftovers_of_a_killed_start_are_removed(saved: Saved) -> None:
    saved.save(2, 1)
    leftovers = [f"{CHECKPOINTS}/.writing-step-00000004-epoch-0002-9", ".config.yaml.12ab.tmp", f".{MODEL}.12ab.tmp"]
    leftovers += ["attempts/.0001.json.12ab.tmp", ".notes.tmp"]
    for name in leftovers:
        (saved.folder / name).touch()
    assert saved.resume_point().checkpoint is not None
    assert [name for name in leftovers if (saved.folder / name).exists()] == [".notes.tmp"]


def test_other_ranks_check_only_that_they_see_the_folder(saved: Saved) -> None:
    """A single process stands in for rank 1: rank 0's checkpoint reaches it by broadcast."""
    ctx: Any = SimpleNamespace(
        is_main_process=False, main_process_first=lambda call: call(), broadcast=lambda value: value
    )
    saved.save(2, 1)
    saved.run = dataclasses.replace(saved.run, ctx=ctx)
    before = contents(saved.folder)
    assert saved.resume_point(config="other: 1\n").checkpoint is None
    assert contents(saved.folder) == before
    (saved.folder / CONFIG).unlink()
    assert "expected one folder that every machine shares" in saved.refusal()


def test_results_without_a_checkpoint_are_archived(saved: Saved) -> None:
    for number in (1, 2):
        (saved.folder / MODEL).write_text(f"model {number}")
        (saved.folder / METRICS).write_text(f"rows {number}")
        assert saved.resume_point().checkpoint is None
        assert printed(saved.run).endswith(f"archived as earlier-{number}-{MODEL}\n")
        assert (saved.folder / f"earlier-{number}-{MODEL}").read_text() == f"model {number}"
        assert (saved.folder / f"earlier-{number}-{METRICS}").read_text() == f"rows {number}"
        assert not (saved.folder / MODEL).exists()
    saved.resume_point().restore(state := make_training_state())
    assert state.step == 0


def test_a_folder_that_cannot_be_read_is_a_user_error(saved: Saved, monkeypatch: pytest.MonkeyPatch) -> None:
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(store, "load_latest", denied)
    assert "cannot be read or cleaned up ([Errno 13] Permission denied)" in saved.refusal()


def test_a_checkpoint_of_another_run_is_refused_and_the_config_kept(saved: Saved) -> None:
    path = saved.save(2, 1)
    identity = dataclasses.replace(SAVED.identity, architecture="resnet34")
    text = saved.refusal(metadata=dataclasses.replace(SAVED, identity=identity), config="other: 1\n")
    assert text.startswith(f"{path}: a checkpoint of another run:\n  model: resnet18 there, resnet34 now\n")


@pytest.mark.parametrize(("order", "seed"), [("0" * 64, 3), (digest(0), 3), (digest(1), 4)])
def test_another_order_of_the_examples_is_refused(order: str, seed: int, saved: Saved) -> None:
    run = dataclasses.replace(SAVED, seed=seed, versions={"torch": "2.0\x1b[31m"})
    path = saved.save(3, 1, order_digest=order, run=run)
    text = saved.refusal()
    assert text.startswith(f"{path}: the examples are drawn in another order than when it was written, by torch")
    assert "torch 2.0\\x1b[31m: resume with that version" in text


def test_a_checkpoint_beyond_the_run_is_refused(saved: Saved) -> None:
    saved.save(6, 3)
    for options, now in (({"epochs": 2}, "2 of 2"), ({"steps": 1}, "4 of 1")):
        assert f"after 3 epochs of 2 steps, but this run has {now}: choose" in saved.refusal(**options)


def test_a_finished_run_without_its_model_file_is_refused(saved: Saved) -> None:
    saved.save(3, 1)
    (saved.folder / MODEL).unlink()
    assert saved.resume_point().checkpoint is not None, "training restores it from the best checkpoint"
    saved.save(8, 4)
    (saved.folder / MODEL).unlink()
    assert saved.refusal().startswith(f"{saved.folder / MODEL} is gone, and the run is finished.")


@pytest.mark.parametrize(
    ("epoch", "epochs", "patience", "is_finished"),
    [(4, 4, None, True), (3, 4, 2, True), (3, 4, 3, False), (3, 4, None, False), (4, 5, None, False), (2, 4, 1, False)],
)
def test_a_run_is_finished_after_its_last_epoch_or_an_early_stop(
    epoch: int, epochs: int, patience: int | None, is_finished: bool, saved: Saved
) -> None:
    rows = [
        {"kind": "epoch", "epoch": number, "val_accuracy": accuracy, "val_loss": 1.0}
        for number, accuracy in enumerate([0.6, 0.5, 0.5, 0.5][:epoch], start=1)
    ]
    is_within_an_epoch = epoch == 2
    metrics = "".join(f"{json.dumps(row)}\n" for row in rows)
    saved.save(STEPS * epoch + is_within_an_epoch, epoch, metrics=metrics)
    assert saved.resume_point(epochs=epochs, patience=patience).is_finished == is_finished


def test_a_checkpoint_that_does_not_fit_the_model_is_refused(saved: Saved) -> None:
    saved.save(3, 1)
    with pytest.raises(UserError, match="does not fit this run"):
        saved.resume_point().restore(make_training_state(width=5))


def describe(saved: Saved, step: int, epoch: int, *, epochs: int = 4, batch_norm: str = "", **run: Any) -> list[str]:
    saved.save(step, epoch, run=dataclasses.replace(SAVED, **run))
    return saved.resume_point(epochs=epochs).describe(batch_norm=batch_norm).split("\n")


def test_the_position_is_described(saved: Saved) -> None:
    assert describe(saved, 2, 1) == ["resuming after epoch 1 of 4 (step 2)"]
    assert describe(saved, 6, 2) == ["resuming after epoch 2 of 4 (step 6), in epoch 3 after 2 of its 2 steps"]


def test_another_world_size_schedule_and_versions_are_described(saved: Saved) -> None:
    now = versions()
    then = {**now, "torch": "2.0\n", "unknown": "3"}
    _, processes, longer, changed = describe(saved, 2, 1, epochs=6, world_size=3, versions=then)
    assert processes.startswith("  on 1 processes instead of 3: the same examples, crops and learning rates; equal ")
    assert longer == "  for 12 steps instead of 8: from here on, the learning rate is that of the longer run"
    assert changed == f"  with other versions, which may change results: torch 2.0\\n then, {now['torch']} now"
    for epoch, batch_norm in enumerate(("train", "frozen-with-weights", "frozen"), start=2):
        _, processes = describe(saved, STEPS * epoch, epoch, batch_norm=batch_norm, world_size=3)
        assert ("BatchNorm, whose statistics are each process's own" in processes) == (batch_norm != "frozen")
