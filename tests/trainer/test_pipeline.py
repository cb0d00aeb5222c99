import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from regraft.contract import ATTEMPTS, BASELINE, CHECKPOINTS, PRETRAIN, REPORT, read_attempts
from tests.folders import image_folder
from tests.trainer.phases import with_options
from trainer import pipeline
from trainer.config.schema import Config
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.pipeline import run
from trainer.report.summary import TrainResult
from trainer.run.session import OpenRun


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def small(tmp_path: Path, folder: Path) -> Config:
    """Return the config of a run of one update."""
    root = image_folder(tmp_path / "images", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    return with_options(
        Config(),
        run={"dir": str(folder), "device": "cpu", "threads": 1},
        data={"root": str(root), "image_size": 32, "num_workers": 0, "cache": str(tmp_path / "cache")},
        model={"name": "squeezenet1_1", "weights": None},
        train={"epochs": 1, "batch_size": 4},
    )


def with_all_phases(config: Config) -> Config:
    return with_options(config, pretrain={"root": config.data.root, "epochs": 2}, baseline={"lr": 0.1})


def test_all_phases_are_one_attempt_that_ends_done(small: Config, folder: Path) -> None:
    run(with_all_phases(small), StopSignals())
    (record,) = read_attempts(folder)
    assert (record.state, record.stage, record.step, record.steps, record.epoch, record.epochs) == (
        "done", BASELINE, 1, 1, 1, 1,
    )  # fmt: skip
    assert record.ended is not None
    assert "heartbeat" not in [thread.name for thread in threading.enumerate()]
    for phase in (PRETRAIN, ".", BASELINE):
        assert (folder / phase / CHECKPOINTS / "LATEST").exists()
        assert (folder / phase / ATTEMPTS).exists() == (phase == ".")
        page = (folder / phase / REPORT).read_text(encoding="utf-8")
        assert "finished after epoch" in page
        assert ("The same model from scratch: " in page) == (phase == ".")
        assert "data:image/webp" in page


@pytest.mark.parametrize(
    ("section", "options", "message"),
    [
        ("transfer", {"trainable": "from:layer9"}, "no module 'layer9'"),
        ("optim", {"warmup": "9 steps"}, "the peak learning rate"),
        ("transfer", {"wise_ft": True}, r"wise_ft.* set data\.val_fraction 0\.1"),
        ("regularization", {"early_stopping": 3}, r"early_stopping.* set data\.val_fraction 0\.1"),
        ("model", {"head_init": "source-labels", "aliases": {"c": "d"}}, "'c', which is not one of your classes"),
    ],
)
def test_options_of_the_fine_tuning_are_checked_before_pretraining(
    section: str, options: dict[str, Any], message: str, small: Config, folder: Path
) -> None:
    with pytest.raises(UserError, match=message):
        run(with_options(with_all_phases(small), **{section: options}), StopSignals())
    assert not (folder / PRETRAIN).exists()


@pytest.mark.parametrize(
    ("phase", "trained", "state"), [(PRETRAIN, [PRETRAIN], "stopped"), (BASELINE, [PRETRAIN, "", BASELINE], "done")]
)
def test_a_signal_with_the_last_epoch_of_a_phase_stops_before_the_next(
    phase: str, trained: list[str], state: str, small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    phases: list[str] = []

    def train_run(config: Config, run: OpenRun, *, weights: str | None) -> TrainResult:
        assert run.lock is not None
        phases.append(run.lock.record.stage)
        if phases[-1] == phase:
            run.signals.received = signal.SIGTERM
        return TrainResult(folder=run.folder, examples=(1, 1), val_split=None)

    monkeypatch.setattr(pipeline, "train_run", train_run)
    monkeypatch.setattr(pipeline, "summary", lambda *_, **__: "")
    monkeypatch.setattr(pipeline, "comparison", lambda *_: "")
    if state == "done":
        run(with_all_phases(small), StopSignals())
    else:
        with pytest.raises(Stopped, match="SIGTERM"):
            run(with_all_phases(small), StopSignals())
    assert phases == trained
    assert read_attempts(folder)[0].state == state


def test_a_resumed_run_keeps_the_precision_that_auto_chose(
    small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    small = with_options(small, run={"dir": "~/run"})
    run(with_options(small, run={"report": "off"}), StopSignals())
    assert not (folder / REPORT).exists()
    assert "precision fp32: runs of less than 256 images are not measured" in capsys.readouterr().out
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # another machine, or another launcher
    run(with_options(small, train={"epochs": 2}), StopSignals())
    output = capsys.readouterr().out
    assert "precision fp32: as at the start of this run" in output
    assert "resuming after epoch 1 of 2" in output
    assert "finished after epoch 2 of 2" in (folder / REPORT).read_text(encoding="utf-8")
    run(with_options(small, run={"resume": "never"}, train={"channels_last": True}), StopSignals())
    assert "precision bf16: as accelerate launch --mixed_precision asks" in capsys.readouterr().out
