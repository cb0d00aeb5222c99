"""The checkpoint manager with its saver: what is saved, when, and what ends the run."""

import dataclasses
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn

from regraft.contract import CHECKPOINTS, EVALUATION, MODEL, STOP, read_attempt
from tests.trainer.checkpoint.checkpoints import METADATA, contents
from tests.trainer.runs import MODEL_METADATA, make_run, printed, stop_heartbeat
from trainer.checkpoint import manager as manager_module
from trainer.checkpoint import saver as saver_module
from trainer.checkpoint import store
from trainer.checkpoint.early_stopping import EarlyStopping
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.saver import CheckpointSaver
from trainer.checkpoint.state import CheckpointId
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.evaluate import Evaluation, SelectBy
from trainer.loop import StepDecision
from trainer.metrics import BestEpoch, MetricState
from trainer.model.metadata import read_metadata
from trainer.optim.ema import ModelEma
from trainer.optim.schedule import TrainSchedule
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun
from trainer.state import TrainState

STEPS = 2
"""Updates of an epoch."""
SUMS = MetricState(rows=((0.5, 2, 4),), seconds=2.0, compute_seconds=1.0)
AVERAGE = 77.0  # weights of the moving average, which no test updates
NEVER = RetentionPolicy(every_steps=None, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)
EVERY_EPOCH = dataclasses.replace(NEVER, every_steps=STEPS, keep_best=True)
CONTINUE = StepDecision(save=False, stop=None)


@dataclass
class Log:
    """The metrics of a run."""

    epochs: list[dict[str, Any]] = field(default_factory=list)
    failure: UserError | None = None

    @property
    def text(self) -> str:
        return "".join(f"{json.dumps(row)}\n" for row in self.epochs)


@dataclass
class Training:
    """A run whose weights a test sets, and its checkpoint manager."""

    run: OpenRun
    state: TrainState
    log: Log
    saver: CheckpointSaver
    manager: CheckpointManager

    def set_weights(self, value: float) -> None:
        with torch.no_grad():
            for parameter in self.state.model.parameters():
                parameter.fill_(value)

    def sync(self, step: int) -> StepDecision:
        self.state.step = step
        return self.manager.sync_flags()

    def save(self, epoch: int, step: int) -> None:
        """Save within an epoch."""
        self.state.epoch, self.state.step, self.state.metrics = epoch, step, SUMS
        self.manager.save()

    def end_epoch(self, epoch: int, accuracy: float, *, loss: float = 1.0, split: str = "test") -> str | None:
        """End an epoch with the weights at its number; return the reason to stop."""
        self.set_weights(epoch)
        self.state.epoch, self.state.step, self.state.metrics = epoch, STEPS * epoch, None
        row = {f"{split}_accuracy": accuracy, f"{split}_loss": loss}
        self.log.epochs.append({"kind": "epoch", "epoch": epoch, "step": STEPS * epoch, **row})
        correct = round(10 * accuracy)
        evaluation = Evaluation(loss_sum=10 * loss, correct=(correct, 0), support=(10, 0), predicted=(10, 0))
        return self.manager.end_epoch({split: evaluation})

    @property
    def checkpoints(self) -> list[tuple[int, int]]:
        """Return (step, epoch) of each checkpoint, newest first."""
        return [tuple(checkpoint) for checkpoint in store.list_checkpoints(self.run.folder / CHECKPOINTS)]

    def path(self, step: int, epoch: int) -> Path:
        return self.run.folder / CHECKPOINTS / CheckpointId(step, epoch).name

    def model_metrics(self) -> Any:
        """Return the metrics in the header of the model file."""
        metadata = read_metadata(self.run.folder / MODEL)
        assert metadata is not None
        return metadata.metrics

    def model_file(self) -> tuple[float, Any]:
        """Return a weight of the model file, and the epoch in its header."""
        return load_file(self.run.folder / MODEL)["0.weight"].flatten()[0].item(), self.model_metrics()["epoch"]

    def recorded_position(self) -> tuple[int, int, int, int]:
        """Return step, steps, epoch and epochs of the attempt's record."""
        assert self.saver.wait()
        record = read_attempt(self.run.root / "attempts" / f"{self.run.attempt:04}.json")
        assert record is not None
        return record.step, record.steps, record.epoch, record.epochs


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the manager's clock, which a test sets."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(manager_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


Make = Callable[..., Training]


@pytest.fixture
def make(tmp_path: Path, clock: SimpleNamespace, ctx: DistributedContext) -> Iterator[Make]:
    locks: list[RunLock] = []

    def make(
        retention: RetentionPolicy = EVERY_EPOCH,
        *,
        is_writer: bool = True,
        epochs: int = 4,
        split: str | None = None,
        patience: int | None = None,
        select_by: SelectBy = "accuracy",
        ema: bool = False,
        **position: Any,
    ) -> Training:
        if is_writer:
            for lock in locks:
                lock.end("failed")
            locks.append(RunLock.acquire(tmp_path, log=print))
        run = make_run(tmp_path, ctx, locks[-1] if is_writer else None)
        model = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
        model(torch.zeros(2, 3, 1, 1)).sum().backward()
        optimizer.step()
        state = TrainState(model=model, optimizer=optimizer, ema=ModelEma(model, 0.9 if ema else None), **position)
        if ema:
            for parameter in state.ema.model.parameters():
                parameter.data.fill_(AVERAGE)
        early_stopping, log = EarlyStopping(split=split, patience=patience, select_by=select_by), Log()
        saver = CheckpointSaver(
            run,
            retention=retention,
            metadata=dataclasses.replace(METADATA, steps_per_epoch=STEPS),
            model_metadata=MODEL_METADATA,
            selected_on=early_stopping.selected_on,
            order_digest=lambda epoch: f"order of epoch {epoch}",
        )
        schedule = TrainSchedule(batch_sizes=(4, 3), epochs=epochs, logs_per_epoch=1, lr_multiplier=lambda step: 1.0)
        manager = CheckpointManager(
            run, state, schedule, saver=saver, retention=retention, early_stopping=early_stopping, logger=log
        )
        return Training(run, state, log, saver, manager)

    yield make
    for lock in locks:
        stop_heartbeat(lock)


# --- flags


def test_heartbeat_ticks_at_each_update_and_allows_more_time_to_save(make: Make) -> None:
    training = make(NEVER)
    heartbeat = training.manager.heartbeat
    with training.manager:
        training.sync(1)
        assert (heartbeat.ticks, heartbeat.step, heartbeat.timeout_extended) == (1, 1, False)
        training.save(1, 3)
        assert heartbeat.timeout_extended
        training.sync(4)
        assert not heartbeat.timeout_extended
        training.end_epoch(3, 0.5)
        assert heartbeat.timeout_extended
    assert (heartbeat.ticks, heartbeat.step) == (4, 6)


def test_save_is_due_by_steps_and_by_seconds_since_the_last_checkpoint(make: Make, clock: SimpleNamespace) -> None:
    training = make(dataclasses.replace(NEVER, every_steps=3, every_seconds=60.0))
    with training.manager:
        assert [training.sync(step).save for step in range(1, 6)] == [False, False, True, False, False]
        clock.now += 60
        assert training.sync(7).save
        training.save(0, 7)
        assert not training.sync(8).save
        clock.now += 60
        assert training.sync(10).save


def stop_by_file(training: Training, clock: SimpleNamespace) -> None:
    with training.manager:
        assert training.sync(1) == CONTINUE
        (training.run.root / STOP).touch()
        clock.now += 2  # it is looked for once a second
        assert training.sync(2) == StepDecision(save=False, stop="the file STOP")
        training.save(1, 3)
        raise Stopped("the file STOP")


def test_stop_file_is_removed_once_the_run_has_stopped(make: Make, clock: SimpleNamespace) -> None:
    training = make(NEVER)
    with pytest.raises(Stopped):
        stop_by_file(training, clock)
    assert not (training.run.root / STOP).exists()
    assert training.checkpoints == [(3, 1)]
    training = make(NEVER, epochs=1)
    with training.manager:
        (training.run.root / STOP).touch()
        clock.now += 2
        assert training.end_epoch(1, 0.5) == "the file STOP"
    assert (training.run.root / STOP).exists(), "the next phase has yet to stop"


# --- failures


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
NO_SPACE = "the state of the run could not be saved .*No space left.*make room"
NOT_FINITE = "^the update of step 4 has left values that are not finite in {}: .*optim.lr"
Spoil = Callable[[Training, pytest.MonkeyPatch], object]


def raise_in(module: object, name: str, error: Exception) -> Spoil:
    def fail(*_: object, **__: object) -> None:
        raise error

    return lambda _, monkeypatch: monkeypatch.setattr(module, name, fail)


def take_over(training: Training, _: object) -> None:
    assert training.run.lock is not None
    record = dataclasses.replace(training.run.lock.record, attempt=2, lease_id="other")
    (training.run.root / "attempts" / "0002.json").write_text(record.to_json())


FAILURES: dict[str, tuple[Spoil, float, str]] = {
    "checkpoint": (raise_in(store, "write", FULL), 0.4, NO_SPACE),  # a worse epoch writes no model
    "model": (raise_in(saver_module, "write_model", FULL), 0.9, NO_SPACE),
    "defect": (raise_in(store, "write", ZeroDivisionError("a defect")), 0.4, "a defect"),
    "NaN": (lambda t, _: t.state.model[1].running_mean.fill_(torch.nan), 0.9, NOT_FINITE.format("1.running_mean")),
    "average": (lambda t, _: t.state.ema.model[0].bias.data.fill_(torch.inf), 0.9, NOT_FINITE.format("0.bias")),
    "lock": (take_over, 0.9, "attempt 2 on .* has taken over this run from attempt 1"),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_failed_save_changes_no_file_and_is_raised_after_the_next_update(
    case: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, accuracy, message = FAILURES[case]
    training, before = make(ema=case == "average"), dict[str, bytes]()

    def train() -> None:
        with training.manager:
            training.end_epoch(1, 0.5)
            assert training.saver.wait()
            spoil(training, monkeypatch)
            before.update(contents(training.run.folder))
            training.end_epoch(2, accuracy)
            training.saver.wait()
            training.sync(5)

    with pytest.raises((UserError, ZeroDivisionError), match=message):
        train()
    assert contents(training.run.folder) == before
    assert training.checkpoints == [(2, 1)]


def test_a_failure_of_the_logger_or_of_the_last_checkpoint_is_raised(
    make: Make, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = make(epochs=1)
    training.log.failure = UserError("no metrics")
    with pytest.raises(UserError, match="no metrics"), training.manager:
        training.sync(1)
    training = make(epochs=1)
    raise_in(store, "write", FULL)(training, monkeypatch)
    with pytest.raises(UserError, match="No space left"), training.manager:
        training.end_epoch(1, 0.5)
    with pytest.raises(UserError, match="No space left"):  # instead of Stopped
        stop_by_file(make(NEVER), clock)
    assert training.checkpoints == []


# --- checkpoints


def test_attempt_records_the_position_of_the_last_checkpoint(make: Make) -> None:
    training = make(dataclasses.replace(NEVER, every_steps=4), epoch=1, step=2)
    with training.manager:
        assert training.recorded_position() == (2, 8, 1, 4), "where the run resumes"
        for epoch, position in ((2, (4, 8, 2, 4)), (3, (4, 8, 2, 4)), (4, (8, 8, 4, 4))):
            training.end_epoch(epoch, 0.5)
            assert training.recorded_position() == position, "after epoch 3, no checkpoint is due"


def test_a_position_is_saved_once_and_training_goes_on_while_its_copy_is_written(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that resumes where its evaluation was interrupted may be stopped there again."""
    training, write, written = make(epoch=0, step=2), store.write, dict[CheckpointId, set[float]]()

    def record(folder: Path, checkpoint: CheckpointId, files: Mapping[str, bytes], **options: Any) -> None:
        assert checkpoint not in written
        written[checkpoint] = set(load(files[store.MODEL])["0.weight"].flatten().tolist())
        write(folder, checkpoint, files, **options)

    monkeypatch.setattr(store, "write", record)
    with training.manager:
        training.save(0, 2)
        training.end_epoch(1, 0.5)
        for epoch, step in ((1, 3), (1, 3), (1, 4), (2, 5)):
            training.set_weights(step)
            training.save(epoch, step)
            training.set_weights(99)
    assert written == {(2, 1): {1}, (3, 1): {3}, (4, 1): {4}, (5, 2): {5}}
    assert store.read(training.path(5, 2)).state.metrics == SUMS


@pytest.mark.parametrize(
    ("retention", "checkpoints"),
    [
        (dataclasses.replace(EVERY_EPOCH, keep_last=1), [[(2, 1)], [(4, 2)], [(6, 3), (4, 2)], [(8, 4), (4, 2)]]),
        (dataclasses.replace(NEVER, keep_best=True, keep_last=1), [[(2, 1)], [(4, 2)], [(4, 2)], [(8, 4), (4, 2)]]),
        (NEVER, [[], [], [], [(8, 4)]]),
    ],
)
def test_the_best_epoch_is_the_model_file_whatever_is_saved(
    retention: RetentionPolicy, checkpoints: list[list[tuple[int, int]]], make: Make
) -> None:
    training = make(retention)
    with training.manager:
        for epoch, accuracy in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
            assert training.end_epoch(epoch, accuracy) is None
            training.saver.wait()
            assert training.checkpoints == checkpoints[epoch - 1]
            assert training.model_file() == (min(epoch, 2), min(epoch, 2))
    assert store.read(training.path(8, 4)).state.best == BestEpoch(epoch=2, step=4, value=0.9, loss=1.0)
    assert training.model_metrics() == {**training.log.epochs[1], "selected_on": "test"}


def test_another_metric_selects_the_best_epoch(make: Make) -> None:
    training = make(select_by="log_loss")
    (training.run.folder / EVALUATION).touch()
    with training.manager:
        for epoch, (accuracy, loss) in enumerate([(0.9, 1.0), (0.5, 0.5), (0.9, 0.7), (0.8, 0.6)], start=1):
            training.end_epoch(epoch, accuracy, loss=loss)
            training.saver.wait()
            assert training.model_file() == (min(epoch, 2), min(epoch, 2))
    assert training.state.best == BestEpoch(epoch=2, step=4, value=-0.5, loss=0.5)
    assert not (training.run.folder / EVALUATION).exists(), "it was of another model file"


def test_of_equal_accuracies_the_lower_loss_then_the_first_is_the_best(make: Make) -> None:
    training = make(split="val", epochs=6, epoch=1, step=2, best=BestEpoch(epoch=1, step=2, value=0.8, loss=1.0))
    with training.manager:
        for epoch, (accuracy, loss, best) in enumerate(
            [(0.7, 0.1, 1), (0.8, 1.0, 1), (0.8, 0.5, 4), (0.8, 0.5, 4), (0.8, 0.9, 4)], start=2
        ):
            training.end_epoch(epoch, accuracy, loss=loss, split="val")
            training.saver.wait()
            assert training.state.best is not None
            assert training.state.best.epoch == best
            assert (training.run.folder / MODEL).exists() == (epoch >= 4), "a worse epoch does not replace it"
    assert training.model_metrics()["selected_on"] == "val"


def test_a_stop_at_the_end_of_an_epoch_saves_a_checkpoint_and_an_early_one_records_its_length(make: Make) -> None:
    training = make(NEVER)
    with training.manager:
        training.end_epoch(1, 0.5)
        training.run.signals.received = signal.SIGTERM
        assert training.end_epoch(2, 0.4) == "SIGTERM"
    assert training.checkpoints == [(4, 2)]
    assert training.model_file() == (1, 1)
    training = make(NEVER, patience=1, split="val")
    with training.manager as manager:
        for epoch, accuracy in enumerate([0.5, 0.6, 0.6], start=1):
            training.end_epoch(epoch, accuracy, split="val")
            assert manager.stopped_early == (epoch == 3)
    assert training.checkpoints == [(6, 3), (4, 2)]
    assert training.recorded_position() == (6, 6, 3, 3)


def test_other_ranks_write_nothing(make: Make) -> None:
    training = make(is_writer=False)
    (training.run.root / STOP).touch()
    with training.manager:
        assert training.sync(1) == CONTINUE, "rank 0 reads the file STOP"
        training.save(0, 1)
        training.end_epoch(1, 0.5)
    assert training.state.best is not None
    assert [path.name for path in training.run.root.iterdir()] == [STOP]


# --- repair


def test_a_model_of_a_lost_epoch_is_restored_from_the_best_checkpoint(make: Make) -> None:
    killed = make(ema=True)
    with killed.manager:
        killed.end_epoch(1, 0.5)
        best = killed.state.best
        killed.end_epoch(2, 0.9)  # its model file was written, its checkpoint not
    training = make(ema=True, epoch=1, step=2, best=best)
    training.log.epochs = killed.log.epochs[:1]
    training.manager.repair_best_model()
    assert training.model_file() == (AVERAGE, 1)
    line = f"{MODEL} was not of the best epoch (1): restored from its checkpoint\n"
    assert printed(training.run) == line
    training.manager.repair_best_model()
    assert printed(training.run) == line, "it is, now"
    (training.run.folder / MODEL).write_bytes(b"damaged")
    training.manager.repair_best_model()
    assert training.model_file() == (AVERAGE, 1)


def test_without_the_best_checkpoint_the_best_epoch_is_selected_anew_or_its_loss_reported(make: Make) -> None:
    killed = make()
    with killed.manager:
        killed.end_epoch(2, 0.9)
    best = BestEpoch(epoch=1, step=2, value=0.5, loss=1.0)
    training = make(epoch=1, step=2, best=best)
    training.manager.repair_best_model()
    assert training.state.best is None
    assert "the best epoch is selected anew" in printed(training.run)
    (training.run.folder / MODEL).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors of the best epoch \(1\) is gone"):
        make(epoch=1, step=2, best=best).manager.repair_best_model()
