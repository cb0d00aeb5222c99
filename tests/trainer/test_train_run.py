"""Runs of a small model: what they evaluate, how they stop, and how they resume."""

import csv
import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from regraft.contract import CHECKPOINTS, EVALUATION, EXCLUDED, MODEL, PREDICTIONS, STOP, read_attempts
from tests.trainer.phases import (
    EPOCHS,
    STEPS,
    assert_equal_runs,
    audit_rows,
    contents,
    copy_run,
    in_folder,
    rewind,
    rows,
    small_config,
    train,
    with_options,
)
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.config.resolve import ResolvedConfig
from trainer.distributed.signals import Stopped
from trainer.distributed.watchdog import Heartbeat
from trainer.errors import UserError
from trainer.report.summary import best_row
from trainer.run.session import OpenRun


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    """Return the config of a finished run."""
    config = small_config(tmp_path_factory.mktemp("run"))
    train(config)
    return config


def test_the_watchdog_covers_all_work_that_takes_long(
    finished: ResolvedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The pass of the linear probe, the evaluation before the first step, training, and the eleven of WiSE-FT."""
    ticks: list[list[int]] = []
    tick = Heartbeat.tick

    def recorded_tick(heartbeat: Heartbeat, step: int) -> None:
        ticks[-1].append(step)
        tick(heartbeat, step)

    @contextmanager
    def watchdog(run: OpenRun, heartbeat: Heartbeat | None = None) -> Iterator[Heartbeat]:
        ticks.append([])
        yield heartbeat or Heartbeat()

    monkeypatch.setattr(Heartbeat, "tick", recorded_tick)
    monkeypatch.setattr(OpenRun, "watchdog", watchdog)
    result, _ = train(
        with_options(
            in_folder(finished, tmp_path / "run"),
            model={"weights": str(Path(finished.run.dir) / MODEL), "head_init": "linear-probe"},
            transfer={"wise_ft": True},
            checkpoint={"every": None},
        )
    )
    assert ticks[:2] == [[0], [0, 0]], "one batch of the probe; val and test before the first step"
    assert set(ticks[2]) == set(range(1, STEPS * EPOCHS + 1))
    assert ticks[3] == [STEPS * EPOCHS] * (11 + (1 if result.alpha == 1 else 2)), "on val, and one or two on test"


@pytest.mark.parametrize("head_init", ["source-labels", "linear-probe"])
def test_an_initialized_output_layer_is_evaluated_before_the_first_step_and_fitted_once(
    head_init: str, finished: ResolvedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = Path(finished.run.dir) / MODEL  # its header names the same classes
    config = with_options(
        in_folder(finished, tmp_path / "run"), model={"weights": str(weights), "head_init": head_init}
    )
    _, printed = train(config)
    start = rows(config)[0]
    assert (start["kind"], start["epoch"], start["step"]) == ("start", 0, 0)
    assert (start["val_seen"], start["test_seen"]) == (5, 2)
    low, high = start["test_interval"]
    assert 0 <= low <= start["test_accuracy"] == start["test_correct"] / 2 <= high <= 1
    assert f"before the first step: val accuracy {start['val_accuracy']:.3f} (95 % interval" in printed
    assert ("linear probe: one pass over the 7 training images" in printed) == (head_init == "linear-probe")

    resumed = copy_run(config, tmp_path / "resumed")
    rewind(resumed, 1, 0)
    monkeypatch.setattr("trainer.train_run.fit_linear_probe", lambda *_, **__: pytest.fail("a second pass"))
    _, printed = train(resumed)
    assert "before the first step" not in printed
    assert_equal_runs(resumed, config)


def test_the_evaluation_of_the_best_epoch_is_that_of_the_model_file(finished: ResolvedConfig, tmp_path: Path) -> None:
    evaluated = copy_run(finished, tmp_path / "run")
    best = best_row(rows(finished, "epoch"), "val")
    kept = contents(evaluated)
    saved = json.loads((tmp_path / "run" / EVALUATION).read_text())
    assert (saved["epoch"], saved["splits"]["val"]["accuracy"]) == (best["epoch"], best["val_accuracy"])
    (tmp_path / "run" / EVALUATION).unlink()  # the next start evaluates the file itself
    train(evaluated)
    assert contents(evaluated) == kept


def test_a_run_with_images_on_the_device_resumes_bit_identically(
    finished: ResolvedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.config.preflight._check_image_cache", lambda *_: None)  # it is refused on a CPU
    config = with_options(in_folder(finished, tmp_path / "device"), data={"cache_images": "device"})
    train(config)
    resumed = copy_run(config, tmp_path / "resumed")
    rewind(resumed, 3, 1)
    train(resumed)
    assert_equal_runs(resumed, config)
    for row, on_host in zip(audit_rows(config), audit_rows(finished), strict=True):
        assert row["examples"] == on_host["examples"]
    last, on_host = rows(config, "epoch")[0], rows(finished, "epoch")[0]
    assert last["train_loss"] == pytest.approx(on_host["train_loss"], rel=0.02), "crops within 2 gray levels"


def test_excluded_images_are_part_of_the_identity_of_the_data(finished: ResolvedConfig, tmp_path: Path) -> None:
    (file := tmp_path / "exclude.csv").write_text("path,reason\ntrain/a/000.png,blurred\nval/a/001.png,twice\n")
    config = with_options(in_folder(finished, tmp_path / "run"), data={"exclude": str(file)})
    printed = train(config)[1]
    assert "images left out by data.exclude" in printed
    assert ": 2 (1 of train, 1 of val)" in printed
    assert [row["split"] for row in csv.DictReader((tmp_path / "run" / EXCLUDED).open())] == ["train", "val"]
    assert len(list(csv.DictReader((tmp_path / "run" / PREDICTIONS).open()))) == 4 + 2
    moved = file.rename(tmp_path / "moved.csv")
    assert "finished already" in train(with_options(config, data={"exclude": str(moved)}))[1]
    with pytest.raises(UserError, match="a checkpoint of another run:\n  training images: a 4 there, 5 now"):
        train(with_options(config, data={"exclude": None}))


def test_a_stopped_run_reports_its_position_and_resumes(finished: ResolvedConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    config = with_options(in_folder(finished, folder), checkpoint={"every": None})

    def signal_before_the_first_update(run: OpenRun) -> None:
        run.signals.received = signal.SIGTERM

    for step in (1, 2, 2):  # the third start stops before the evaluation that follows step 2
        with pytest.raises(Stopped) as stopped:
            train(config, before=signal_before_the_first_update)
        assert (stopped.value.reason, stopped.value.saved) == ("SIGTERM", f"step {step} of 6, in epoch 1 of 3")
        assert store.list_checkpoints(folder / CHECKPOINTS)[0] == CheckpointId(step, 0)
        last = read_attempts(folder)[-1]
        assert (last.state, last.step, last.steps, last.epoch, last.epochs) == ("stopped", step, 6, 0, 3)
    with pytest.raises(Stopped, match="the file STOP"):
        train(config, before=lambda run: (run.folder / STOP).touch())
    assert not (folder / STOP).exists()
    train(config)
    assert_equal_runs(config, finished)


def test_early_stopping_ends_a_run_that_does_not_improve(finished: ResolvedConfig, tmp_path: Path) -> None:
    folder = tmp_path / "run"

    def with_patience(patience: int) -> ResolvedConfig:
        return with_options(
            in_folder(finished, folder),
            optim={"lr": 1e-30, "weight_decay": 0.0},  # nothing is learned: the first epoch is the best
            train={"epochs": 9, "logs_per_epoch": 1},
            checkpoint={"every": "1 epoch"},
            regularization={"early_stopping": patience},
        )

    result, printed = train(with_patience(2))
    assert [row["epoch"] for row in result.rows] == [1, 2, 3]
    assert "stopped early, after epoch 3 of 9: none of the last 2 was better on val than epoch 1" in printed
    _, printed = train(with_patience(2))
    assert "finished already: stopped early, after epoch 3 of 9" in printed
    result, printed = train(with_patience(3))
    assert "stopped early, after epoch 4 of 9: none of the last 3" in printed
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]
    positions = [(r.state, r.step, r.steps, r.epoch, r.epochs) for r in read_attempts(folder)]
    assert positions[:2] == [("done", 6, 6, 3, 3)] * 2
    assert positions[-1] == ("done", 8, 8, 4, 4)
