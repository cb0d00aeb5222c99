import os
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import image_folder
from trainer import pipeline
from trainer.config.schema import (
    BaselineConfig,
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    PretrainConfig,
    RegularizationConfig,
    RunConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError
from trainer.pipeline import pretrain_config, resolve, run
from trainer.run import lock
from trainer.run.folder import CHECKPOINTS, CONFIG, MARK, STOP
from trainer.run.lock import ATTEMPTS, AttemptRecord, RunLock, read_attempts
from trainer.train_run import TrainResult

SCRATCH = ModelConfig(name="resnet18", weights=None)
NOBODY = "~nobody-of-this-name/there"


def config(root: str | None, model: ModelConfig = SCRATCH) -> Config:
    return Config(data=DataConfig(root=root), model=model)


@pytest.mark.parametrize("root", [None, "", "  "])
def test_without_a_root_there_is_nothing_to_train_on(root: str | None) -> None:
    with pytest.raises(UserError, match=r"data\.root is not set: give the folder of your images"):
        resolve(config(root))


@pytest.mark.parametrize(
    ("key", "given"),
    [
        ("data.root", config(NOBODY)),
        ("run.dir", replace(config("images"), run=RunConfig(dir=NOBODY))),
        ("pretrain.root", replace(config("images"), pretrain=PretrainConfig(root=NOBODY))),
        ("model.weights", config("images", ModelConfig(name="resnet18", weights=NOBODY))),
        ("model.weights", config("images", ModelConfig(name="resnet18", weights=f"{NOBODY}.safetensors"))),
    ],
)
def test_a_home_folder_that_does_not_exist_is_named(key: str, given: Config) -> None:
    with pytest.raises(UserError) as caught:
        resolve(given)
    assert str(caught.value).startswith(f"{key} is {NOBODY}")
    assert str(caught.value).endswith("there is no such home folder here: give the whole path")


def test_paths_become_whole_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "w.pth").touch()
    given = Config(
        run=RunConfig(dir="runs/a"),
        data=DataConfig(root="图 片"),
        model=ModelConfig(name="resnet18", weights="~/w.pth"),
    )
    found = resolve(given)
    assert found.run.dir == str(tmp_path / "runs" / "a")
    assert found.data.root == str(tmp_path / "图 片")
    assert found.model.weights == str(tmp_path / "home" / "w.pth")
    sourced = resolve(replace(given, model=SCRATCH, pretrain=PretrainConfig(root="~/source")))
    assert sourced.pretrain.root == str(tmp_path / "home" / "source")
    assert resolve(sourced) == sourced, "nothing is left to resolve"


def test_names_stay_names() -> None:
    given = Config(
        data=DataConfig(root="synthetic-target"),
        model=SCRATCH,
        pretrain=PretrainConfig(root="synthetic-source"),
    )
    found = resolve(given)
    assert (found.data.root, found.pretrain.root) == ("synthetic-target", "synthetic-source")
    assert resolve(config("images", ModelConfig(name="resnet18"))).model.weights == "DEFAULT"


# --- a run as a whole; what its stages do is test_finetune.py's


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def small(tmp_path: Path) -> Config:
    root = image_folder(tmp_path / "images", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    return Config(
        run=RunConfig(dir=str(tmp_path / "run"), device="cpu", threads=1),
        data=DataConfig(root=str(root), image_size=32, num_workers=0, cache=str(tmp_path / "cache")),
        model=ModelConfig(name="squeezenet1_1", weights=None),
        train=TrainConfig(epochs=1, batch_size=4),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


def with_all_stages(config: Config) -> Config:
    return replace(
        config, pretrain=PretrainConfig(root=config.data.root, epochs=2), baseline=BaselineConfig(lr=0.1)
    )


def test_a_run_says_that_it_is_done_and_where_it_stands(small: Config, folder: Path) -> None:
    assert run(small, StopSignals()) is not None
    (record,) = read_attempts(folder)
    assert (record.state, record.stage, record.step, record.steps, record.epoch, record.epochs) == (
        "done", "", 1, 1, 1, 1,
    )  # fmt: skip
    assert record.ended is not None
    assert not [thread for thread in lock.threading.enumerate() if thread.name == "sign of life"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"transfer": TransferConfig(trainable="from:layer9")}, "no module 'layer9'"),
        ({"optim": OptimConfig(lr_mult={"layre": 0.1})}, "'layre' matches no parameter"),
        ({"optim": OptimConfig(warmup="9 steps")}, "the peak learning rate"),
        ({"transfer": TransferConfig(wise_ft=True)}, r"set data\.val_fraction 0\.1"),
        (
            {"model": ModelConfig(name="squeezenet1_1", weights=None, head_init="source-labels", aliases={"c": "d"})},
            "'c', which is no class of yours",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_is_wrong_with_the_fine_tuning_is_said_before_the_source_model_trains(
    changes: dict[str, Any], said: str, small: Config, folder: Path
) -> None:
    sourced = replace(small, pretrain=PretrainConfig(root=small.data.root, epochs=2))
    with pytest.raises(UserError, match=said):
        run(replace(sourced, **changes), StopSignals())
    assert not (folder / "pretrain").exists()


def test_all_stages_are_one_attempt(small: Config, folder: Path) -> None:
    outcome = run(with_all_stages(small), StopSignals())
    assert outcome is not None
    (record,) = read_attempts(folder)
    assert (record.state, record.stage, record.step, record.epochs) == ("done", "baseline", 1, 1)
    for stage in ("pretrain", ".", "baseline"):
        assert (folder / stage / CHECKPOINTS / "LATEST").exists()
        assert (folder / stage / ATTEMPTS).exists() == (stage == ".")


def test_a_run_that_fails_says_why(small: Config, folder: Path) -> None:
    wrong = replace(small, model=ModelConfig(name="squeezenet1_1", weights=str(folder.parent / "w.pth")))
    torch.save({}, folder.parent / "w.pth")
    with pytest.raises(UserError) as caught:
        run(wrong, StopSignals())
    (record,) = read_attempts(folder)
    assert (record.state, record.step) == ("failed", 0)
    assert record.reason
    assert str(caught.value).startswith(record.reason[:40])


def test_a_stop_while_the_data_is_prepared_is_written_down(
    small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGUSR1)

    monkeypatch.setattr("trainer.train_run.load_examples", interrupted)
    with StopSignals() as signals, pytest.raises(Stopped) as stopped:
        run(small, signals)
    assert (stopped.value.reason, stopped.value.saved) == ("SIGUSR1", None)
    (record,) = read_attempts(folder)
    assert (record.state, record.reason) == ("stopped", "SIGUSR1")


def test_what_could_not_be_written_down_does_not_hide_why_the_run_ended(
    small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taken_over(*_: Any, **__: Any) -> None:
        later = replace(read_attempts(folder)[0], attempt=2, token="other", host="node17", pid=4)
        (folder / ATTEMPTS / "0002.json").write_text(lock._text(later))
        raise UserError("the first trouble")

    monkeypatch.setattr(pipeline, "train_run", taken_over)
    with pytest.raises(UserError, match="the first trouble") as caught:
        run(small, StopSignals())
    assert "node17, process 4 has taken this run over" in caught.value.__notes__[0]


# --- signals between two stages


class Trained:
    """Stands for `train_run`: trains nothing, and lets a signal come while a stage ends."""

    def __init__(self, signals: StopSignals, stage: str) -> None:
        self.signals, self.stage = signals, stage
        self.made: list[str] = []

    def __call__(self, config: Config, *_: Any, attempt: RunLock, **__: Any) -> TrainResult:
        self.made.append(attempt.record.stage)
        if attempt.record.stage == self.stage:
            self.signals.received = signal.SIGTERM
        row = {
            "epoch": 1, "test_accuracy": 1.0, "test_loss": 1.0, "test_interval": [0, 1], "test_correct": 1,
            "test_seen": 1, "train_seen": 1, "train_loss": 1.0, "seconds": 1.0,
        }  # fmt: skip
        return TrainResult(
            folder=Path(config.run.dir), rows=(row,), examples=(1, 1), selection=None, seconds=1.0
        )


@pytest.mark.parametrize(
    ("stage", "made", "state"),
    [
        ("pretrain", ["pretrain"], "stopped"),
        ("", ["pretrain", ""], "stopped"),
        ("baseline", ["pretrain", "", "baseline"], "done"),
    ],
)
def test_a_signal_that_came_with_a_stages_last_epoch_stops_before_the_next(
    stage: str, made: list[str], state: str, small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    signals = StopSignals()
    trained = Trained(signals, stage)
    monkeypatch.setattr(pipeline, "train_run", trained)
    if state == "done":
        run(with_all_stages(small), signals)
    else:
        with pytest.raises(Stopped, match="SIGTERM"):
            run(with_all_stages(small), signals)
    assert trained.made == made
    assert read_attempts(folder)[0].state == state


# --- opening the run folder


@pytest.fixture
def elsewhere(folder: Path) -> Iterator[AttemptRecord]:
    """Let another process of this machine work on the run, with a config of its own."""
    (folder / ATTEMPTS).mkdir(parents=True)
    with subprocess.Popen(["sleep", "1000"]) as sleeper:
        started = lock._start_of(sleeper.pid)
        assert started is not None
        record = replace(lock._own_record(1), pid=sleeper.pid, started=started)
        (folder / ATTEMPTS / "0001.json").write_text(lock._text(record))
        yield record
        sleeper.kill()


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_run_that_is_going_on_is_neither_joined_nor_moved_aside(
    resume: Any, small: Config, folder: Path, elsewhere: AttemptRecord
) -> None:
    (folder / CONFIG).write_text(MARK)
    (folder / STOP).touch()
    with pytest.raises(UserError, match=f"attempt 1 of this run is going on .process {elsewhere.pid} on"):
        run(replace(small, run=replace(small.run, resume=resume)), StopSignals())
    assert sorted(path.name for path in folder.iterdir()) == sorted([STOP, ATTEMPTS, CONFIG]), (
        "its STOP is its own"
    )
    assert [path.name for path in folder.parent.glob("run*")] == ["run"]
    assert len(read_attempts(folder)) == 1


def test_never_moves_a_run_aside_whose_process_was_killed(
    small: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small, StopSignals())
    record = replace(read_attempts(folder)[0], state="running", started=1)
    (folder / ATTEMPTS / "0001.json").write_text(lock._text(record))
    run(replace(small, run=replace(small.run, resume="never")), StopSignals())
    assert f"the earlier run was moved to {folder}.earlier-1" in capsys.readouterr().out
    assert [(found.attempt, found.state) for found in read_attempts(folder)] == [(1, "done")]
    assert read_attempts(folder.with_name("run.earlier-1"))[0] == record


def test_a_stop_from_before_a_start_is_not_obeyed(
    small: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder.mkdir()
    (folder / STOP).touch()
    run(small, StopSignals())
    assert f"{folder / STOP}: from before this start, removed" in capsys.readouterr().out
    assert not (folder / STOP).exists()
    assert read_attempts(folder)[0].state == "done"


def test_a_refused_start_takes_no_number(small: Config, folder: Path) -> None:
    run(small, StopSignals())
    other = replace(small, run=replace(small.run, seed=1))
    with pytest.raises(UserError, match=r"run\.seed: 0 there, 1 now"):
        run(other, StopSignals())
    assert len(read_attempts(folder)) == 1


# --- what the first start chose


def test_what_auto_chose_is_kept_where_the_run_goes_on(
    small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(folder.parent))
    small = replace(small, run=replace(small.run, dir="~/run"))
    run(small, StopSignals())
    assert "precision fp32: the safe choice on a CPU" in capsys.readouterr().out
    longer = replace(small, train=replace(small.train, epochs=2), checkpoint=CheckpointConfig(every=None))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")  # another machine, or another launch
    run(longer, StopSignals())
    said = capsys.readouterr().out
    assert "precision fp32: as this run began with" in said
    assert "going on after epoch 1 of 2" in said
    run(replace(small, run=replace(small.run, resume="never")), StopSignals())
    assert "precision bf16: as accelerate launch --mixed_precision asks" in capsys.readouterr().out


def test_never_begins_anew_once_however_often_torchrun_starts_its_processes_again(
    small: Config, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(small, StopSignals())
    never = replace(small, run=replace(small.run, resume="never"))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one launch")
    run(never, StopSignals())
    aside = folder.with_name("run.earlier-1")
    assert aside.exists()
    run(never, StopSignals())  # by the same parent, in the same launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run(never, StopSignals())
    assert not folder.with_name("run.earlier-2").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a third")
    run(never, StopSignals())
    assert folder.with_name("run.earlier-2").exists()


@pytest.mark.parametrize(
    ("state", "is_meant"), [("running", True), ("failed", True), ("stopped", False), ("done", False)]
)
def test_a_stop_that_was_made_after_a_start_was_killed_is_still_meant(
    state: Any, is_meant: bool, small: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(small, StopSignals())
    record = replace(read_attempts(folder)[0], state=state, started=1)
    (folder / ATTEMPTS / "0001.json").write_text(lock._text(record))
    (folder / "STOP").touch()
    run(small, StopSignals())
    assert (folder / "STOP").exists() == is_meant
    assert ("from before this start, removed" in capsys.readouterr().out) != is_meant


def test_a_finished_runs_figures_are_restored(small: Config, folder: Path) -> None:
    run(small, StopSignals())
    path = folder / "metrics.jsonl"
    before = path.read_bytes()
    path.write_bytes(before[: len(before) // 2])
    run(small, StopSignals())
    assert path.read_bytes() == before


def test_a_source_model_has_nothing_to_stop_early_by_and_nothing_to_be_pulled_to() -> None:
    given = replace(
        config("images"),
        pretrain=PretrainConfig(root="others"),
        regularization=RegularizationConfig(early_stopping=3, ema=0.9),
        transfer=TransferConfig(l2_sp=0.1, wise_ft=True),
    )
    source = pretrain_config(given)
    assert (source.regularization.early_stopping, source.regularization.ema) == (None, 0.9)
    assert (source.transfer.l2_sp, source.transfer.wise_ft) == (0, False)
