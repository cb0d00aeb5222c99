import errno
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from tests.folders import image_folder
from trainer import train_run as module
from trainer.checkpoint import store
from trainer.checkpoint.store import CheckpointId
from trainer.config.parse import dump
from trainer.config.schema import CheckpointConfig, Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.distributed import context
from trainer.distributed.signals import Stopped, StopSignals
from trainer.distributed.watchdog import Heartbeat, Watchdog
from trainer.errors import UserError
from trainer.pipeline import resolve
from trainer.report.metrics import Row, epoch_rows, parse_rows
from trainer.run.folder import CHECKPOINTS, METRICS, MODEL, STOP, check_resumable, write_config
from trainer.run.lock import ATTEMPTS, RunLock, read_attempts
from trainer.train_run import TrainResult, train_run

EPOCHS, STEPS = 3, 2
TIMED = ("seconds", "examples_per_sec", "examples_per_sec_compute", "memory_bytes")


def train(
    config: Config,
    *,
    signals: StopSignals | None = None,
    started: Callable[[RunLock], object] = lambda attempt: None,
    weights: str | None = None,
) -> tuple[TrainResult, str]:
    """Start a run as `stages` does, and return what came of it, and what was seen of it."""
    screen = io.StringIO()
    console = Console(file=screen, width=100, soft_wrap=True)
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    folder = Path(config.run.dir)
    check_resumable(folder, dump(config), resume="auto")
    attempt = RunLock.acquire(folder, log=console.print)
    write_config(folder, dump(config))
    started(attempt)
    try:
        outcome = train_run(
            config,
            ctx,
            console,
            weights=weights or config.model.weights,
            attempt=attempt,
            signals=signals or StopSignals(),
        )
    except BaseException:
        attempt.end("failed")
        raise
    attempt.end("done")
    return outcome, screen.getvalue()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Return the config of a run that has ended."""
    home = tmp_path_factory.mktemp("finished")
    threads = torch.get_num_threads()
    root = image_folder(home / "images", {"train": {"a": 4, "b": 3}, "test": {"a": 1, "b": 1}})
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(root), image_size=32, num_workers=0, cache=str(home / "cache")),
            model=ModelConfig(name="squeezenet1_1", weights=None),
            train=TrainConfig(epochs=EPOCHS, batch_size=4, precision="fp32", logs_per_epoch=2),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    train(config)
    yield config
    torch.set_num_threads(threads)


@pytest.fixture
def copy(finished: Config, tmp_path: Path) -> Config:
    """Return the config of a copy of that run, to be damaged."""
    shutil.copytree(finished.run.dir, tmp_path / "run")
    return in_folder(finished, tmp_path / "run")


def in_folder(config: Config, folder: Path) -> Config:
    return replace(config, run=replace(config.run, dir=str(folder)))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all that a run has left but its config (it holds run.dir) and who made it."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != "config.yaml" and path.parent.name != ATTEMPTS
    }


def back_to(config: Config, step: int, epoch: int) -> None:
    """Leave a run as a kill does whose newest checkpoint stands there."""
    folder = Path(config.run.dir) / CHECKPOINTS
    for place in store.list_checkpoints(folder):
        if place > CheckpointId(step, epoch):
            shutil.rmtree(folder / place.name)
    (folder / store.LATEST).write_text(CheckpointId(step, epoch).name + "\n")
    assert store.list_checkpoints(folder)[0] == CheckpointId(step, epoch)


def rows(config: Config) -> list[Row]:
    """Return the rows of a run's metrics, without times."""
    found = parse_rows((Path(config.run.dir) / METRICS).read_text(encoding="utf-8"), "metrics")
    return [{key: value for key, value in row.items() if key not in TIMED} for row in found]


def equal(one: Config, other: Config) -> bool:
    """Return whether two runs have come to the same: weights, moments, best epoch's model, and every figure."""
    last = Path(CHECKPOINTS) / CheckpointId(EPOCHS * STEPS, EPOCHS).name
    for name in (MODEL, last / store.MODEL, last / store.OPTIMIZER):
        a, b = (load_file(Path(config.run.dir) / name) for config in (one, other))
        if not (a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)):
            return False
    return rows(one) == rows(other)


def test_what_comes_before_and_after_the_updates_is_watched_too(
    finished: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The probe's pass, the evaluation before the first step, training, and the eleven of WiSE-FT."""
    watched: list[Heartbeat] = []

    class Watch(Watchdog):
        def __enter__(self) -> Heartbeat:
            watched.append(super().__enter__())
            return watched[-1]

    monkeypatch.setattr(module, "Watchdog", Watch)
    source = str(Path(finished.run.dir) / MODEL)
    config = replace(
        in_folder(finished, tmp_path / "run"),
        data=replace(finished.data, val_fraction=0.3, seed=3),
        model=replace(finished.model, weights=source, head_init="linear-probe"),
        transfer=replace(finished.transfer, wise_ft=True),
    )
    outcome, _ = train(config)
    probe, before, training, line = watched
    assert probe.passed == 1, "a batch"
    assert (before.passed, before.step) == (2, 0), "val and test"
    assert training.passed >= STEPS * EPOCHS
    tested = 1 if outcome.alpha == 1 else 2
    assert (line.passed, line.step) == (11 + tested, training.step), (
        "eleven points on val, one or two on test"
    )
    assert not (Path(config.run.dir) / "hangs").exists()


def test_a_finished_run_is_only_reported(copy: Config) -> None:
    folder = Path(copy.run.dir)
    before = contents(folder)
    outcome, seen = train(copy)
    assert f"finished already, after epoch {EPOCHS}" in seen
    assert "A larger train.epochs goes on from here" in seen
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3]
    assert contents(folder) == before
    assert [(record.attempt, record.state) for record in read_attempts(folder)] == [(1, "done"), (2, "done")]


PLACES = [(1, 0), (2, 1), (3, 1), (5, 2)]


@pytest.mark.parametrize("place", PLACES, ids=lambda place: f"step {place[0]}")
def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    place: tuple[int, int], copy: Config, finished: Config
) -> None:
    back_to(copy, *place)
    outcome, seen = train(copy)
    assert f"going on after epoch {place[1]} of 3 (step {place[0]})" in seen
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3]
    assert equal(copy, finished)


@pytest.mark.parametrize("lost", ["gone", "damaged", "a row less", "a row more"])
def test_the_rows_are_restored_from_the_checkpoint(lost: str, copy: Config, finished: Config) -> None:
    file = Path(copy.run.dir) / METRICS
    back_to(copy, 3, 1)
    lines = file.read_text().splitlines(keepends=True)
    if lost == "gone":
        file.unlink()
    else:
        file.write_text(
            {"damaged": "{", "a row less": "".join(lines[1:]), "a row more": lines[0] + file.read_text()}[
                lost
            ]
        )
    outcome, _ = train(copy)
    assert [row["epoch"] for row in epoch_rows(list(outcome.rows))] == [1, 2, 3]
    assert rows(copy) == rows(finished)


def test_a_finished_run_whose_metrics_are_gone_is_reported_from_its_checkpoint(copy: Config) -> None:
    (Path(copy.run.dir) / METRICS).unlink()
    outcome, _ = train(copy)
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3]


def test_the_figures_of_a_run_that_has_lost_its_state_are_not_written_over(copy: Config) -> None:
    folder = Path(copy.run.dir)
    shutil.rmtree(folder / CHECKPOINTS)
    before = contents(folder)
    with pytest.raises(
        UserError, match=r"attempt 1 has saved step 6 of this run, but no checkpoint is there"
    ):
        train(copy)
    assert contents(folder) == before


def test_a_run_killed_before_its_first_checkpoint_starts_anew(copy: Config, finished: Config) -> None:
    # The best epoch's model is written before its checkpoint, and a kill may come between the two.
    folder = Path(copy.run.dir)
    shutil.rmtree(folder / CHECKPOINTS)
    shutil.rmtree(folder / ATTEMPTS)
    train(copy)
    assert equal(copy, finished)


def test_a_finished_run_may_be_made_longer(copy: Config) -> None:
    longer = replace(copy, train=replace(copy.train, epochs=EPOCHS + 1))
    outcome, seen = train(longer)
    assert "going on after epoch 3 of 4 (step 6)" in seen
    assert "for 8 steps instead of 6: from here on, the learning rate is that of the longer run" in seen
    assert [row["epoch"] for row in outcome.rows] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"train\.epochs: 4 there, 3 now"):
        train(copy)


def test_a_run_that_is_stopped_says_where_it_stands_and_goes_on(tmp_path: Path, finished: Config) -> None:
    config = in_folder(finished, tmp_path / "run")
    config = replace(config, checkpoint=CheckpointConfig(every=None))
    signals = StopSignals()
    signals.received = signal.SIGTERM  # it came before the first update
    for step, said in (
        (1, "step 1 of 6, in epoch 1 of 3"),
        (2, "step 2 of 6, in epoch 1 of 3"),
        (2, "step 2 of 6, in epoch 1 of 3"),  # the evaluation has yet to be made, and was not begun
    ):
        with pytest.raises(Stopped) as stopped:
            train(config, signals=signals)
        assert (stopped.value.reason, stopped.value.saved) == ("SIGTERM", said)
        assert store.list_checkpoints(tmp_path / "run" / CHECKPOINTS)[0] == CheckpointId(step, 0)
        last = read_attempts(tmp_path / "run")[-1]
        assert (last.step, last.steps, last.epoch, last.epochs) == (step, 6, 0, 3)
    train(config)
    assert equal(config, finished)


def test_a_file_stop_is_honoured_and_removed(tmp_path: Path, finished: Config) -> None:
    config = in_folder(finished, tmp_path / "run")
    with pytest.raises(Stopped, match="the file STOP"):
        train(config, started=lambda attempt: (attempt.folder / STOP).touch())
    assert not (tmp_path / "run" / STOP).exists()
    train(config)
    assert equal(config, finished)


def test_an_audit_is_written_and_goes_on(copy: Config) -> None:
    with_audit = replace(copy, run=replace(copy.run, audit=True))
    back_to(copy, 3, 1)
    train(with_audit)
    lines = (Path(copy.run.dir) / "audit" / "rank-0.jsonl").read_text().splitlines()
    assert [line.split(", ")[:3] for line in lines] == [
        ['{"attempt": 2', f'"epoch": {step // STEPS}', f'"step": {step}'] for step in (3, 4, 5)
    ]


@pytest.mark.parametrize("full_at", ["write_model", "store.write", "metrics"])
def test_a_full_disk_is_one_sentence_and_leaves_what_was_saved(
    full_at: str, copy: Config, finished: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    folder = Path(copy.run.dir)
    back_to(copy, 1, 0)
    (folder / MODEL).unlink()  # no epoch has ended
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(
            {
                "write_model": "trainer.checkpoint.manager.write_model",
                "store.write": "trainer.checkpoint.store.write",
                "metrics": "trainer.report.metrics.MetricsFile.append",
            }[full_at],
            full,
        )
        with pytest.raises(UserError, match=r"could not be (saved|written) .*No space left.*make room"):
            train(copy)
    after = contents(folder)
    if full_at == "store.write":  # the best epoch's model is written before its checkpoint
        after.pop(MODEL, None)
    whole = {name for name in before if name.startswith((CHECKPOINTS, MODEL))}
    assert {name: after[name] for name in whole} == {name: before[name] for name in whole}
    assert not [name for name in after if name.endswith(".tmp") or ".writing" in name]
    train(copy)
    assert equal(copy, finished)
