import dataclasses
import errno
import json
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from trainer.checkpoint import manager as module
from trainer.checkpoint import store
from trainer.checkpoint.manager import CheckpointManager
from trainer.checkpoint.retention import RetentionPolicy
from trainer.checkpoint.state import BestEpoch, RunIdentity
from trainer.checkpoint.store import CheckpointId, LoadedCheckpoint
from trainer.data.augment import Preprocessing
from trainer.data.loader import EpochOrder
from trainer.distributed import context
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.loop import Progress, StepDecision
from trainer.metrics import Metrics, MetricState
from trainer.model.metadata import ModelMetadata, read_metadata
from trainer.optim.ema import ModelEma
from trainer.run.folder import CHECKPOINTS, MODEL, STOP
from trainer.run.lock import RunLock, read_record

EPOCHS = 4
ORDER = EpochOrder(examples=7, batch_size=4, seed=3)  # 2 steps an epoch
SUMS = MetricState(rows=((0.5, 2, 4),), seconds=2.0, compute_seconds=1.0)
NEVER = RetentionPolicy(every_steps=None, every_seconds=None, keep_last=2, keep_best=False, keep_every=None)
EVERY_EPOCH = dataclasses.replace(NEVER, every_steps=2, keep_best=True)


@dataclass
class Told:
    """What a report has to say."""

    rows: list[dict[str, Any]] = field(default_factory=list)
    failure: UserError | None = None

    @property
    def text(self) -> str:
        return "".join(json.dumps(row) + "\n" for row in self.rows)


@dataclass
class Run:
    """A keeper, and what it keeps."""

    keeper: CheckpointManager
    folder: Path
    net: nn.Module
    told: Told
    signals: StopSignals

    def update(self, number: float) -> None:
        """Stand for updates: the weights become that number."""
        with torch.no_grad():
            for parameter in self.net.parameters():
                parameter.fill_(number)

    def epoch(
        self, epoch: int, accuracy: float, *, loss: float = 1.0, part: str = "test", **row: Any
    ) -> str | None:
        """Come to the end of an epoch, with the weights at its number."""
        self.update(epoch)
        figures = Metrics(
            loss_sum=1.0, correct=1, seen=7, seconds=1.0, compute_seconds=1.0, first_nonfinite_step=None
        )
        progress = Progress(epoch=epoch, epoch_step=2, step=2 * epoch, metrics=figures, lr={})
        self.told.rows.append({"kind": "epoch", "epoch": epoch, "step": 2 * epoch, **row})
        right = round(10 * accuracy)
        found = Evaluation(loss_sum=10 * loss, correct=(right, 0), support=(10, 0), predicted=(10, 0))
        return self.keeper.end_epoch(progress, {part: found})

    @property
    def checkpoints(self) -> list[tuple[int, int]]:
        """Return (step, epoch) of what there is, the newest first."""
        return [tuple(place) for place in store.list_checkpoints(self.folder / CHECKPOINTS)]

    def read(self, step: int, epoch: int) -> LoadedCheckpoint:
        return store.read(self.folder / CHECKPOINTS / CheckpointId(step, epoch).name)

    def model(self) -> tuple[float, Any]:
        """Return a weight of the model file, and the epoch that its description names."""
        described = read_metadata(self.folder / MODEL)
        assert described is not None
        return load_file(self.folder / MODEL)["0.weight"].flatten()[0].item(), described.metrics["epoch"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Stand in for the keeper's clock: it moves as a test wants."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


Make = Callable[..., Run]


@pytest.fixture
def make(tmp_path: Path, clock: SimpleNamespace) -> Iterator[Make]:
    threads, attempts = torch.get_num_threads(), list[RunLock]()
    ctx = context.start(device="cpu", precision="fp32", threads=1)

    def make(policy: RetentionPolicy = EVERY_EPOCH, **changes: Any) -> Run:
        attempts.append(RunLock.acquire(tmp_path, log=print))
        net = nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2))
        optimizer = torch.optim.SGD(net.parameters(), momentum=0.9)
        net(torch.zeros(2, 3, 1, 1)).sum().backward()
        optimizer.step()
        told, signals = Told(), StopSignals()
        given: dict[str, Any] = {
            "ctx": ctx,
            "signals": signals,
            "attempt": attempts[-1],
            "folder": tmp_path,
            "model": net,
            "optimizer": optimizer,
            "scaler": None,
            "order": ORDER,
            "epochs": EPOCHS,
            "policy": policy,
            "facts": {
                "seed": 3,
                "schedule": {"kind": "constant", "warmup_steps": 0, "total_steps": 8},
                "chosen": {"precision": "fp32", "channels_last": True},
                "threads": 1,
                "versions": {"torch": "x"},
            },
            "lr_factor": lambda step: 1 / (1 + step),
            "subject": RunIdentity(architecture="resnet18", classes=("a", "图"), examples=(4, 3), data="abc"),
            "description": ModelMetadata(
                version="0",
                architecture="resnet18",
                classes=("a", "图"),
                preprocessing=Preprocessing(
                    image_size=8, resize_size=8, resize="squash", interpolation="bilinear",
                    mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
                ),
                source="",
                metrics={},
            ),
            "selection": None,
            "report": told,
            "best": None,
            "last": None,
            "_saved_at": clock.now,
        }  # fmt: skip
        return Run(CheckpointManager(**{**given, **changes}), tmp_path, net, told, signals)

    yield make
    for attempt in attempts:
        attempt._over.set()
        attempt._thread.join()
    torch.set_num_threads(threads)


NOTHING = StepDecision(save=False, stop=None)


# --- what is agreed at a boundary


@pytest.mark.parametrize("rank", [0, 1])
def test_boundaries_are_counted_and_every_rank_expects_to_wait_for_what_is_saved(
    rank: int, make: Make
) -> None:
    run = make(NEVER, **({} if rank == 0 else {"attempt": None}))
    heartbeat = run.keeper.heartbeat
    with run.keeper as keeper:
        for step in (1, 2):
            keeper.sync_flags(step)
            assert (heartbeat.passed, heartbeat.step, heartbeat.extended) == (step, step, False)
        keeper.save(1, 3, SUMS)
        assert heartbeat.extended
        keeper.sync_flags(4)
        assert not heartbeat.extended
        run.epoch(3, 0.5)
        assert heartbeat.extended
    assert (heartbeat.passed, heartbeat.step) == (5, 6)


def test_a_checkpoint_is_due_by_steps(make: Make) -> None:
    with make(dataclasses.replace(NEVER, every_steps=3)).keeper as keeper:
        assert [keeper.sync_flags(step).save for step in range(1, 8)] == [
            step % 3 == 0 for step in range(1, 8)
        ]


def test_a_checkpoint_is_due_by_the_clock_that_begins_anew_with_each(
    make: Make, clock: SimpleNamespace
) -> None:
    with make(dataclasses.replace(NEVER, every_seconds=60.0)).keeper as keeper:
        assert not keeper.sync_flags(1).save
        clock.now += 59.9
        assert not keeper.sync_flags(1).save
        clock.now += 0.1
        assert keeper.sync_flags(1).save
        keeper.save(0, 1, SUMS)
        assert not keeper.sync_flags(2).save
        clock.now += 60
        assert keeper.sync_flags(3).save


def test_without_an_interval_none_is_due(make: Make, clock: SimpleNamespace) -> None:
    with make(NEVER).keeper as keeper:
        clock.now += 1e6
        assert [keeper.sync_flags(step) for step in range(1, 10)] == [NOTHING] * 9


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_becomes_everyones_reason(number: signal.Signals, make: Make) -> None:
    run = make(NEVER)
    with run.keeper as keeper:
        assert keeper.sync_flags(1) == NOTHING
        run.signals.received = number
        assert keeper.sync_flags(2) == keeper.sync_flags(3) == StepDecision(save=False, stop=number.name)


def stop_by_file(run: Run, clock: SimpleNamespace) -> None:
    with run.keeper as keeper:
        (run.folder / STOP).touch()
        clock.now += 1.1
        wish = keeper.sync_flags(1)
        assert wish == StepDecision(save=False, stop="the file STOP")
        keeper.save(0, 1, SUMS)
        raise Stopped(str(wish.stop))


def test_the_file_stop_is_seen_within_a_second(make: Make, clock: SimpleNamespace) -> None:
    run = make(NEVER)
    with run.keeper as keeper:
        assert keeper.sync_flags(1) == NOTHING
        (run.folder / STOP).touch()
        clock.now += 0.5
        assert keeper.sync_flags(2) == NOTHING, "the disk is not asked after every update"
        clock.now += 0.6
        assert keeper.sync_flags(3) == StepDecision(save=False, stop="the file STOP")
        (run.folder / STOP).unlink()
        assert keeper.sync_flags(4).stop == "the file STOP", "it has been seen"


def test_the_file_stop_is_removed_once_it_is_honoured(make: Make, clock: SimpleNamespace) -> None:
    run = make(NEVER)
    with pytest.raises(Stopped):
        stop_by_file(run, clock)
    assert not (run.folder / STOP).exists()
    assert run.checkpoints == [(1, 0)]


def test_a_stop_that_came_with_the_last_epoch_stays_for_what_follows(
    make: Make, clock: SimpleNamespace
) -> None:
    run = make(NEVER, epochs=1)
    with run.keeper:
        (run.folder / STOP).touch()
        clock.now += 2
        assert run.epoch(1, 0.5) == "the file STOP"
    assert (run.folder / STOP).exists(), "a source model is trained: the run itself has yet to stop"


# --- what ends the run


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("at_fault", ["store.write", "write_model"])
def test_a_full_disk_is_raised_at_the_next_boundary_and_leaves_what_was_saved(
    at_fault: str, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, before = make(), dict[str, bytes]()

    def go() -> None:
        with run.keeper as keeper:
            run.epoch(1, 0.5)
            assert keeper._writer.wait()
            before.update(contents(run.folder))
            patched, name = (module.store, "write") if at_fault == "store.write" else (module, "write_model")
            monkeypatch.setattr(patched, name, full)
            run.epoch(2, 0.4 if at_fault == "store.write" else 0.9)  # a worse epoch writes no model
            keeper._writer.wait()
            keeper.sync_flags(5)

    with pytest.raises(UserError) as caught:
        go()
    text = str(caught.value)
    assert "the state of the run could not be saved" in text
    assert "No space left on device" in text
    assert "make room, and the same command goes on from there" in text
    assert contents(run.folder) == before
    assert run.checkpoints == [(2, 1)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_failure_of_the_last_checkpoint_is_heard_of_too(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make(epochs=1)
    monkeypatch.setattr(module.store, "write", full)
    with pytest.raises(UserError, match="No space left"), run.keeper:
        run.epoch(1, 0.5)


def test_a_stop_whose_checkpoint_fails_is_no_stop(
    make: Make, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make()
    monkeypatch.setattr(module.store, "write", full)
    with pytest.raises(UserError, match="No space left"):
        stop_by_file(run, clock)
    assert run.checkpoints == []


def test_figures_that_could_not_be_written_end_the_run_at_the_next_boundary(make: Make) -> None:
    run = make()

    def go() -> None:
        with run.keeper as keeper:
            keeper.sync_flags(1)
            run.told.failure = UserError("no figures")
            keeper.sync_flags(2)

    with pytest.raises(UserError, match="no figures"):
        go()


def test_an_error_of_ours_is_not_taken_for_the_users(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError

    run = make()
    monkeypatch.setattr(module.store, "write", fail)

    def go() -> None:
        with run.keeper as keeper:
            keeper.save(0, 1, SUMS)
            keeper._writer.wait()
            keeper.sync_flags(2)

    with pytest.raises(ZeroDivisionError):
        go()


@pytest.mark.parametrize("spoilt", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(spoilt: float, make: Make) -> None:
    run = make()

    def go() -> None:
        with run.keeper as keeper:
            run.epoch(1, 0.5)
            with torch.no_grad():
                run.net[0].bias[1] = spoilt  # type: ignore[index, union-attr, operator]
            keeper.save(1, 3, SUMS)
            keeper._writer.wait()
            keeper.sync_flags(4)

    with pytest.raises(UserError) as caught:
        go()
    assert str(caught.value).startswith(
        "the update of step 3 has left values that are not finite in 0.bias: "
    )
    assert "optim.lr" in str(caught.value)
    assert run.checkpoints == [(2, 1)]
    assert run.model() == (1, 1)


def test_a_run_that_another_attempt_has_taken_over_writes_nothing_more(make: Make) -> None:
    old = make()

    def go() -> None:
        with old.keeper as keeper:
            old.epoch(1, 0.5)
            assert keeper._writer.wait()
            # As where this process was taken for dead.
            record = dataclasses.replace(old.keeper.attempt.record, attempt=2, token="other")  # type: ignore[union-attr]
            (old.folder / "attempts" / "0002.json").write_text(json.dumps(dataclasses.asdict(record)))
            before = contents(old.folder)
            old.epoch(2, 0.9)
            keeper._writer.wait()
            assert contents(old.folder) == before, "neither the better model nor the checkpoint"
            keeper.sync_flags(5)

    with pytest.raises(UserError, match=r"attempt 2 on .* has taken this run over from attempt 1"):
        go()


# --- what is saved


def test_within_an_epoch_the_state_is_saved_with_its_sums(make: Make) -> None:
    run = make()
    run.told.rows.append({"kind": "train", "epoch": 0.5})
    with run.keeper as keeper:
        run.update(0.25)
        keeper.save(0, 1, SUMS)
        run.update(0.5)  # training goes on meanwhile
    found = run.read(1, 0)
    state = found.state
    assert (state.step, state.epoch, state.sums, state.best) == (1, 0, SUMS, None)
    assert (state.world_size, state.attempt, state.seed, state.steps_per_epoch) == (1, 1, 3, 2)
    assert state.order == ORDER.digest(0)
    assert state.subject == keeper.identity
    assert state.schedule == {"kind": "constant", "warmup_steps": 0, "total_steps": 8, "lr_factor": 0.5}
    assert state.chosen == {"precision": "fp32", "channels_last": True}
    assert found.metrics == run.told.text == '{"kind": "train", "epoch": 0.5}\n'
    assert load_file(found.path / store.MODEL)["0.weight"].unique().tolist() == [0.25]
    assert set(load_file(found.path / store.OPTIMIZER)) == {
        f"momentum_buffer.{name}" for name, _ in run.net.named_parameters()
    }
    assert not (run.folder / MODEL).exists(), "no epoch has been evaluated"


def test_the_attempt_says_how_far_the_run_is_saved(make: Make) -> None:
    run = make(
        dataclasses.replace(NEVER, every_steps=4),
        last=CheckpointId(2, 1),
        best=BestEpoch(epoch=1, step=2, accuracy=1, loss=0),
    )
    file = run.folder / "attempts" / "0001.json"

    def said() -> tuple[int, int, int, int]:
        record = read_record(file)
        assert record is not None
        return record.step, record.steps, record.epoch, record.epochs

    with run.keeper as keeper:
        assert keeper._writer.wait()
        assert said() == (2, 8, 1, 4), "where it goes on"
        keeper.save(1, 3, SUMS)
        assert keeper._writer.wait()
        assert said() == (3, 8, 1, 4)
        run.epoch(2, 0.5)
        assert keeper._writer.wait()
        assert said() == (4, 8, 2, 4)
        run.epoch(3, 0.5)
        assert said() == (4, 8, 2, 4), "none was due"
        run.epoch(4, 0.5)
    assert said() == (8, 8, 4, 4)


def test_the_same_place_is_not_saved_twice(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    # A run that goes on from where its evaluation was interrupted is stopped there again.
    run = make(last=CheckpointId(2, 0))
    written: list[CheckpointId] = []
    monkeypatch.setattr(module.store, "write", lambda folder, place, files, check: written.append(place))
    with run.keeper as keeper:
        keeper.save(0, 2, SUMS)
        run.epoch(1, 0.5)
        keeper.save(1, 3, SUMS)
        keeper.save(1, 3, SUMS)
    assert written == [(2, 1), (3, 1)]


def test_one_checkpoint_is_written_at_a_time_and_none_is_left_out(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, free = store.write, threading.Lock()

    def alone(*arguments: Any, **given: Any) -> None:
        assert free.acquire(blocking=False), "two at once"
        write(*arguments, **given)
        free.release()

    monkeypatch.setattr(module.store, "write", alone)
    run = make(dataclasses.replace(NEVER, keep_last=9), order=EpochOrder(examples=7, batch_size=1, seed=3))
    with run.keeper as keeper:
        for step in range(1, 6):
            run.update(step)
            keeper.save(0, step, SUMS)
    assert run.checkpoints == [(step, 0) for step in (5, 4, 3, 2, 1)]
    for step, epoch in run.checkpoints:
        weights = load_file(run.read(step, epoch).path / store.MODEL)
        assert weights["0.weight"].unique().tolist() == [step]


# --- the best epoch


def test_the_best_epoch_is_kept_and_is_the_model_file(make: Make) -> None:
    run = make(dataclasses.replace(EVERY_EPOCH, keep_last=1))
    with run.keeper as keeper:
        for epoch, accuracy in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
            assert run.epoch(epoch, accuracy) is None
            assert keeper.best == BestEpoch(
                epoch=min(epoch, 2), step=2 * min(epoch, 2), accuracy=0.9 if epoch > 1 else 0.5, loss=1.0
            )
    assert run.checkpoints == [(8, 4), (4, 2)]
    assert run.model() == (2, 2)
    assert run.read(8, 4).state.best == BestEpoch(epoch=2, step=4, accuracy=0.9, loss=1.0)
    assert (run.folder / CHECKPOINTS / store.LATEST).read_text() == "step-00000008-epoch-0004\n"
    described = read_metadata(run.folder / MODEL)
    assert described is not None
    assert described.metrics == {"kind": "epoch", "epoch": 2, "step": 4, "selected_on": "test"}
    assert described.classes == ("a", "图")


def test_of_equal_accuracies_the_lower_loss_then_the_first_is_the_best(make: Make) -> None:
    run = make()
    with run.keeper as keeper:
        best = []
        for epoch, loss in enumerate([1.0, 0.5, 0.5, 0.9], start=1):
            run.epoch(epoch, 0.7, loss=loss)
            assert keeper.best is not None
            best.append(keeper.best.epoch)
    assert best == [1, 2, 2, 2]
    assert run.model() == (2, 2)


def test_the_best_is_selected_on_the_part_that_is_there_for_it(make: Make) -> None:
    run = make(selection="val")
    with run.keeper:
        run.epoch(1, 0.9, part="val")
        run.epoch(2, 0.8, part="val")
    described = read_metadata(run.folder / MODEL)
    assert described is not None
    assert described.metrics == {"kind": "epoch", "epoch": 1, "step": 2, "selected_on": "val"}


def test_without_an_interval_the_best_epochs_are_saved_and_the_last(make: Make) -> None:
    run = make(dataclasses.replace(NEVER, keep_best=True, keep_last=1))
    with run.keeper as keeper:
        made = []
        for epoch, accuracy in enumerate([0.5, 0.4, 0.6, 0.3], start=1):
            run.epoch(epoch, accuracy)
            keeper._writer.wait()
            made.append(run.checkpoints)
    assert made == [[(2, 1)], [(2, 1)], [(6, 3)], [(8, 4), (6, 3)]]


def test_without_an_interval_and_without_the_best_the_model_file_is_the_bests_still(make: Make) -> None:
    run = make(NEVER)
    with run.keeper as keeper:
        models = []
        for epoch, accuracy in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
            run.epoch(epoch, accuracy)
            keeper._writer.wait()
            models.append(run.model())
            assert run.checkpoints == ([] if epoch < EPOCHS else [(8, 4)])
    assert models == [(1, 1), (2, 2), (2, 2), (2, 2)]


def test_a_run_that_goes_on_knows_its_best(make: Make) -> None:
    run = make(best=BestEpoch(epoch=1, step=2, accuracy=0.8, loss=1.0), last=CheckpointId(2, 1))
    with run.keeper:
        run.epoch(2, 0.7)
        run.epoch(3, 0.8)
    assert not (run.folder / MODEL).exists(), (
        "an earlier start has written it: it is not replaced by a worse one"
    )
    assert run.read(6, 3).state.best == BestEpoch(epoch=1, step=2, accuracy=0.8, loss=1.0)


def test_a_stop_at_the_end_of_an_epoch_saves_whatever_the_interval(make: Make) -> None:
    run = make(NEVER)
    with run.keeper:
        run.epoch(1, 0.5)
        run.signals.received = signal.SIGTERM
        assert run.epoch(2, 0.4) == "SIGTERM"
    assert run.checkpoints == [(4, 2)]
    assert run.model() == (1, 1)


def test_what_is_no_longer_to_be_kept_is_removed(make: Make) -> None:
    run = make(
        RetentionPolicy(every_steps=1, every_seconds=None, keep_last=2, keep_best=True, keep_every=4),
        epochs=6,
    )
    with run.keeper as keeper:
        for epoch in range(1, 7):
            keeper.save(epoch - 1, 2 * epoch - 1, SUMS)
            run.epoch(epoch, 0.9 if epoch == 3 else 0.5)
    assert run.checkpoints == [(12, 6), (11, 5), (8, 4), (6, 3), (4, 2)]
    assert sorted(path.name for path in (run.folder / CHECKPOINTS).iterdir() if path.is_file()) == ["LATEST"]


# --- other ranks


def test_another_rank_agrees_and_saves_nothing(make: Make, tmp_path: Path) -> None:
    run = make()
    shutil.rmtree(tmp_path / "attempts")
    run.keeper.attempt = None
    (tmp_path / STOP).touch()
    with run.keeper as keeper:
        assert keeper.sync_flags(1) == NOTHING, "rank 0 looks for it, on the disk that it has"
        keeper.save(0, 1, SUMS)
        run.epoch(1, 0.5)
        assert keeper.best is not None
        assert keeper.last == CheckpointId(2, 1), "what rank 0 has saved: all of them gather for it, or none"
    assert sorted(path.name for path in tmp_path.iterdir()) == [STOP]


def over(run: Run) -> None:
    assert run.keeper.attempt is not None
    run.keeper.attempt.end("failed")


def test_a_model_file_of_an_epoch_that_was_lost_is_made_anew_from_the_best_ones_checkpoint(
    make: Make,
) -> None:
    run = make()
    with run.keeper:
        run.epoch(1, 0.5)
        best = run.keeper.best
        run.epoch(2, 0.9)
    over(run)
    # Killed after the second epoch's model file was written, and before its checkpoint.
    assert run.model() == (2.0, 2)
    again = make(best=best, last=CheckpointId(2, 1))
    again.told.rows = run.told.rows[:1]
    said: list[str] = []
    again.keeper.repair_best_model(said.append)
    assert again.model() == (1.0, 1)
    assert said == [f"{MODEL} was not of the best epoch (1): made anew from its checkpoint"]
    again.keeper.repair_best_model(said.append)
    assert len(said) == 1, "it is, now"
    (again.folder / MODEL).unlink()
    again.keeper.repair_best_model(said.append)
    assert again.model() == (1.0, 1)


def test_without_the_best_ones_checkpoint_the_best_is_sought_anew_or_the_loss_is_told(make: Make) -> None:
    run = make()
    with run.keeper:
        run.epoch(2, 0.9)
    over(run)
    lost = BestEpoch(epoch=1, step=2, accuracy=0.5, loss=1.0)
    again = make(best=lost, last=CheckpointId(2, 1))
    said: list[str] = []
    again.keeper.repair_best_model(said.append)
    assert again.keeper.best is None
    assert "is of an epoch that was lost" in said[0]
    (again.folder / MODEL).unlink()
    over(again)
    gone = make(best=lost, last=CheckpointId(2, 1))
    with pytest.raises(UserError, match=r"model.safetensors is gone, which holds the best epoch \(1\)"):
        gone.keeper.repair_best_model(said.append)


# --- the moving average, and early stopping


def averaged(run: Run) -> Run:
    """Give a keeper an average of its model, that stands still at 77."""
    run.keeper.ema = ModelEma(run.net, 0.9)
    with torch.no_grad():
        for parameter in run.keeper.ema.model.parameters():
            parameter.fill_(77)
    return run


@pytest.mark.parametrize("policy", [EVERY_EPOCH, NEVER], ids=["every epoch", "never"])
def test_the_model_file_is_the_average_and_a_checkpoint_holds_both(
    policy: RetentionPolicy, make: Make
) -> None:
    run = averaged(make(policy, epochs=2))
    with run.keeper:
        run.epoch(1, 0.9)
        run.epoch(2, 0.8)
    assert run.model() == (77, 1)
    path = run.read(4, 2).path
    held = {
        name: load_file(path / name)["0.weight"].unique().tolist() for name in (store.MODEL, store.AVERAGE)
    }
    assert held == {store.MODEL: [2.0], store.AVERAGE: [77.0]}
    assert not list(path.glob("statistics*")), "one process has them in its tensors"


def test_a_model_file_of_a_later_epoch_is_mended_from_the_average(make: Make) -> None:
    run = averaged(make())
    with run.keeper:
        run.epoch(1, 0.9)
        assert run.keeper._writer.wait()
        (run.folder / MODEL).write_bytes(b"of an epoch whose checkpoint never came to be")
    run.keeper.repair_best_model(print)
    assert run.model() == (77, 1)


def test_weights_whose_average_is_not_finite_are_not_saved(make: Make) -> None:
    run = averaged(make())

    def go() -> None:
        with run.keeper as keeper:
            assert keeper.ema is not None
            next(keeper.ema.model.parameters()).data.fill_(float("nan"))
            keeper.save(0, 1, SUMS)

    with pytest.raises(UserError, match="not finite"):
        go()
    assert run.checkpoints == []


def test_a_run_that_does_not_get_better_ends_with_a_checkpoint_and_says_how_long_it_was(make: Make) -> None:
    run = make(NEVER, patience=1, selection="val")
    accuracies = [0.5, 0.6, 0.6]
    with run.keeper as keeper:
        for epoch, accuracy in enumerate(accuracies, start=1):
            run.epoch(epoch, accuracy, part="val", val_accuracy=accuracy, val_loss=1.0)
            assert keeper.stopped_early == (epoch == 3)
    assert run.checkpoints == [(6, 3)]
    record = read_record(run.folder / "attempts" / "0001.json")
    assert record is not None
    assert (record.step, record.steps, record.epoch, record.epochs) == (6, 6, 3, 3)
