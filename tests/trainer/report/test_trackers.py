"""Experiment trackers: what they receive, what a resumed run adds, and what happens if one of them fails."""

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.tracking import GeneralTracker

from regraft.contract import TRACKERS
from tests.folders import image_folder
from tests.trainer.phases import rows, train, with_options
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.config.sections.run import RunConfig
from trainer.errors import UserError
from trainer.evaluation.final import FinalEvaluation
from trainer.report import tracker_services as services
from trainer.report import tracker_thread
from trainer.report.tracker_entries import Entry, class_names, final_entry, to_entries
from trainer.report.tracker_services import TrackerRun, check_installed
from trainer.report.tracker_thread import TrackerThread

SERVICES = ("tensorboard", "wandb", "mlflow", "trackio")
CLASSES = ("b", "猫 $x_1$")
EPOCHS, STEPS = 2, 2


# Entries


def test_rows_become_entries_with_names_that_trackers_group() -> None:
    classes = {"kind": "classes", "epoch": 1, "step": 4, "split": "test", "classes": ["a", "b"]}
    entries = to_entries(
        [
            {"kind": "start", "epoch": 0, "step": 0, "seconds": 2.0, "test_accuracy": 0.5},
            {"kind": "train", "epoch": 1.0, "step": 4, "train_loss": 0.25, "seconds": 3.0, "lr_head": 0.1},
            {
                **{"kind": "epoch", "epoch": 1, "step": 4, "train_loss": 0.25, "memory_bytes": 7, "seconds": 3.0},
                **{"test_accuracy": 0.75, "test_interval": [0.5, 0.9], "test_loss": float("nan")},
            },
            classes | {"precision": [1.0, 0.5], "recall": [0.5, 1.0], "f1": [0.6, 0.7]},
            {"kind": "from a later version", "epoch": 1, "step": 4},
        ]
    )
    assert [(entry.step, entry.kind, entry.values) for entry in entries] == [
        (0, "start", {"epoch": 0, "speed/seconds": 2.0, "test/accuracy": 0.5}),
        (4, "train", {"epoch": 1.0, "train/loss": 0.25, "lr/head": 0.1}),
        (
            4,
            "epoch",
            {
                **{"epoch": 1, "speed/seconds": 3.0, "test/accuracy": 0.75},
                **{"test_precision/a": 1.0, "test_precision/b": 0.5, "test_recall/a": 0.5, "test_recall/b": 1.0},
                **{"test_f1/a": 0.6, "test_f1/b": 0.7},
            },
        ),
    ]
    final = final_entry(4, {"splits": {"test": {"ece": 0.1, "accuracy": 0.5, "per_class": {}}}}, {})
    assert final.values == {"final/test_ece": 0.1, "final/test_accuracy": 0.5}
    positions = [entry.position for entry in (*entries, final)]
    assert positions == sorted(set(positions))


def test_class_names_are_distinct_and_valid_in_every_tracker() -> None:
    classes = ["a/b", "a:b", "..", "", "猫", "x" * 300, "\udcff", "a\nb"]
    assert class_names(classes) == ["a_b", "a_b_1", "_", "__3", "猫", "x" * 100, "_xff", "a_nb"]
    row = {"kind": "classes", "step": 1, "split": "test", "classes": [str(number) for number in range(101)]}
    assert to_entries([{"kind": "epoch", "epoch": 1, "step": 1}, row])[0].values == {"epoch": 1}


# A tracker that fails


class FakeTracker:
    """Receives entries; `fails` says how many of the next calls raise."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self.fails, self.calls = 0, 0
        self.blocked = threading.Event()
        self.blocked.set()

    def send(self, service: str, tracker: GeneralTracker, entry: Entry) -> None:
        self.blocked.wait(5)
        self.calls += 1
        if self.fails:
            self.fails -= 1
            raise ConnectionError("no route\nto host")
        self.received.append(entry.step)

    def finish(self) -> None:
        self.received.append(-1)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeTracker:
    tracker = FakeTracker()
    monkeypatch.setattr(services, "start", lambda *_: tracker)
    monkeypatch.setattr(services, "send", tracker.send)
    monkeypatch.setattr(services, "run_id", lambda *_: "id-1")
    monkeypatch.setattr(services, "location", lambda *_: "here")
    return tracker


def make_thread(folder: Path, printed: list[str], *, resumed: bool = False) -> TrackerThread:
    run = TrackerRun(project="p", name="r", folder=folder, id=None)
    return TrackerThread("mlflow", run, resumed=resumed, check=lambda: None, warn=printed.append)


def entry(step: int) -> Entry:
    return Entry(step=step, kind="train", values={"train/loss": 1.0})


def test_what_a_tracker_has_missed_is_sent_again_after_one_warning(fake: FakeTracker, tmp_path: Path) -> None:
    printed: list[str] = []
    thread = make_thread(tmp_path, printed)
    thread.start({})
    fake.fails = 1
    for step in (1, 2, 3):
        thread.put(entry(step))
    thread.end()
    thread.join(5)
    assert fake.received == [1, 2, 3, -1]
    assert len(printed) == 1
    assert printed[0].startswith("warning: mlflow fails (ConnectionError: no route to host). Training goes on")
    assert json.loads((tmp_path / "mlflow.json").read_text()) == {"id": "id-1", "position": [3, 1]}

    resumed = make_thread(tmp_path, printed, resumed=True)
    resumed.start({})
    for step in (2, 3, 4):  # the run repeats those since its checkpoint
        resumed.put(entry(step))
    resumed.end()
    resumed.join(5)
    assert fake.received == [1, 2, 3, -1, 4, -1]


def test_a_tracker_that_hangs_does_not_delay_the_run(fake: FakeTracker, tmp_path: Path) -> None:
    printed: list[str] = []
    thread = make_thread(tmp_path, printed)
    thread.start({})
    fake.blocked.clear()
    for step in range(1000):
        thread.put(entry(step))
    thread.end()
    thread.join(0.05)
    assert len(printed) == 1
    assert "has not received everything" in printed[0]
    fake.blocked.set()
    thread.join(5)


def test_another_attempt_that_takes_over_ends_the_thread_in_silence(fake: FakeTracker, tmp_path: Path) -> None:
    def check() -> None:
        raise UserError("attempt 2 has taken over")

    printed: list[str] = []
    run = TrackerRun(project="p", name="r", folder=tmp_path, id=None)
    thread = TrackerThread("mlflow", run, resumed=False, check=check, warn=printed.append)
    thread.start({})
    thread.put(entry(1))
    thread.end()
    thread.join(5)
    assert (fake.received, printed) == ([-1], [])


def test_a_tracker_that_cannot_start_is_an_error_of_a_new_run_and_a_warning_of_a_resumed_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise PermissionError("no API key")

    monkeypatch.setattr(services, "start", refuse)
    printed: list[str] = []
    with pytest.raises(UserError, match=r"mlflow could not be started \(PermissionError: no API key\).*run.trackers"):
        make_thread(tmp_path, printed).start({})
    (tmp_path / "mlflow.json").write_text('{"id": "id-1", "position": [3, 1]}')
    thread = make_thread(tmp_path, printed, resumed=True)
    thread.start({})
    thread.put(entry(9))
    thread.end()
    thread.join(1)
    assert printed == ["warning: mlflow could not be continued, and receives nothing (PermissionError: no API key)"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"id": 3}', '{"id": "x", "position": [1]}', "[" * 100_000])
def test_damaged_state_starts_a_new_run(content: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(content)
    assert tracker_thread.TrackerState.read(tmp_path / "x.json") == tracker_thread.TrackerState()


def test_missing_package_and_wrong_options_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"wandb, which is not installed: pip install 'regraft\[wandb\]'"):
        check_installed(["wandb"])
    with pytest.raises(UserError, match=r"run.tracker_project is 'a/b': expected"):
        RunConfig(tracker_project="a/b")


# Real trackers


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ResolvedConfig]:
    """Return the config of a run of one epoch that was tracked, resumed for a second epoch, killed after it, and
    resumed again.
    """

    def kill(*_: object, **__: object) -> None:
        raise RuntimeError("killed")

    folder, threads = tmp_path_factory.mktemp("tracked"), torch.get_num_threads()
    splits = {"train": dict.fromkeys(CLASSES, 4), "test": dict.fromkeys(CLASSES, 2)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        patch.setenv("MLFLOW_TRACKING_URI", (folder / "mlruns").as_uri())
        patch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
        patch.setenv("TRACKIO_DIR", str(folder / "trackio"))
        patch.chdir(folder)
        config = resolve(
            with_options(
                Config(),
                run={"dir": str(folder / "run"), "device": "cpu", "trackers": SERVICES, "tracker_project": "project"},
                data={"root": str(image_folder(folder / "images", splits)), "image_size": 32, "num_workers": 0},
                model={"name": "squeezenet1_1", "weights": None},
                train={"epochs": 1, "batch_size": 4, "precision": "fp32", "logs_per_epoch": 2},
            )
        )
        _, printed = train(config)
        assert "trackers: tensorboard (" in printed
        config = with_options(config, train={"epochs": EPOCHS})
        with pytest.MonkeyPatch.context() as killed:
            killed.setattr(FinalEvaluation, "write", kill)
            with pytest.raises(RuntimeError, match="killed"):
                train(config)
        _, printed = train(config)
        assert "trackers: tensorboard (" in printed
        _, printed = train(config)
        assert "trackers" not in printed  # they have everything
        yield config
    torch.set_num_threads(threads)


def expected(config: ResolvedConfig, kind: str, key: str) -> list[tuple[int, float]]:
    """Return (step, value) of a column of metrics.jsonl."""
    return [(row["step"], pytest.approx(row[key])) for row in rows(config, kind)]


def test_tensorboard_has_curves_classes_config_and_pictures(tracked: ResolvedConfig) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(f"{tracked.run.dir}/{TRACKERS}/tensorboard").Reload()

    def points(tag: str) -> list[tuple[int, float]]:
        return [(event.step, event.value) for event in events.Scalars(tag)]

    assert points("train/loss") == expected(tracked, "train", "train_loss")
    assert [step for step, _ in points("train/loss")] == [1, 2, 3, 4]
    assert points("test/accuracy") == expected(tracked, "epoch", "test_accuracy")
    assert len(points("test_recall/猫 _x_1_")) == EPOCHS
    assert events.Images("confusion")[-1].width > 100
    assert [event.step for event in events.Images("curves")] == [STEPS, EPOCHS * STEPS]
    final = [STEPS, EPOCHS * STEPS]  # the second one was sent by the start after the kill
    assert [step for step, _ in points("final/test_ece")] == final
    assert "_hparams_/session_start_info" in events.summary_metadata
    options = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    assert b"optim.lr" in options


def test_mlflow_has_one_run_with_metrics_params_and_artifacts(tracked: ResolvedConfig) -> None:
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("project").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert run.data.params["optim.lr"] == str(tracked.optim.lr)
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == expected(tracked, "train", "train_loss")
    assert {artifact.path for artifact in client.list_artifacts(run.info.run_id)} == {"curves.png", "confusion.png"}


def test_wandb_and_trackio_continue_their_run(tracked: ResolvedConfig) -> None:
    folder = Path(tracked.run.dir) / TRACKERS
    run_id = json.loads((folder / "wandb.json").read_text())["id"]
    starts = sorted((folder / "wandb").glob("offline-run-*"))
    assert [path.name.rpartition("-")[2] for path in starts] == [run_id] * 3
    content = (starts[2] / f"run-{run_id}.wandb").read_bytes()
    assert all(name in content for name in (b"final/test_ece", b"optim.lr"))
    content = (starts[1] / f"run-{run_id}.wandb").read_bytes()
    assert all(name in content for name in (b"train/loss", b"test_recall/b"))
    pictures = (starts[2] / "files" / "media" / "images").iterdir()
    assert sorted(path.name.partition("_")[0] for path in pictures) == ["confusion", "curves"]

    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("project")
    logs = SQLiteStorage.get_logs("project", name)
    assert [row["step"] for row in logs if "train/loss" in row] == [1, 2, 3, 4]
    assert {key for row in logs for key in row} >= {"curves", "confusion", "test_recall/b", "final/test_ece"}
    assert SQLiteStorage.get_run_config("project", name)["train.epochs"] == EPOCHS
