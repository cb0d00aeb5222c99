"""The checkpoint manager with its saver: what is saved, when, and what ends the run."""

import dataclasses
import errno
import os
import signal
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load

from regraft.contract import STOP
from tests.trainer.checkpoint.checkpoints import contents
from tests.trainer.checkpoint.managed import NEVER, SUMS, Make, Training
from trainer.checkpoint import saver as saver_module
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.loop import StepDecision

CONTINUE = StepDecision(save=False, stop=None)


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
