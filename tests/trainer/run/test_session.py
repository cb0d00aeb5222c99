"""Open a run folder: lock, archive, STOP file, torchrun restart, and the record of how the start ended."""

import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regraft.contract import CONFIG, HANGS, STOP, attempt_path, latest_attempt, read_attempts
from tests.trainer.runs import make_run, printed, stop_heartbeat
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.run.folder import HEADER, saving_to
from trainer.run.session import OpenRun, open_run

CONFIG_TEXT, OTHER_CONFIG = "optim:\n  lr: 0.1\n", "optim:\n  lr: 0.2\n"
CHECKPOINT = "checkpoints/step-00000006-epoch-0002"
Open = Callable[..., OpenRun]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def open_(folder: Path, ctx: DistributedContext) -> Iterator[Open]:
    runs: list[OpenRun] = []

    def open_(config: str = CONFIG_TEXT, *, resume: Any = "auto", hang_timeout: Any = None) -> OpenRun:
        run = make_run(folder, ctx, None, hang_timeout=hang_timeout)
        options: dict[str, Any] = {"resume": resume, "hang_timeout": hang_timeout, "signals": run.signals}
        runs.append(open_run(folder, config, ctx=ctx, console=run.console, **options))
        return runs[-1]

    yield open_
    for run in runs:
        stop_heartbeat(run.lock)  # type: ignore[arg-type]


def test_a_new_run_has_the_lock_and_a_config(open_: Open, folder: Path) -> None:
    run = open_()
    assert (run.attempt, run.root, run.folder, run.is_writer) == (1, folder, folder, True)
    assert (folder / CONFIG).read_text() == HEADER + CONFIG_TEXT
    assert latest_attempt(folder).state == "running"
    run.check_lock()
    with pytest.raises(UserError, match="attempt 1 of this run is still running"):
        open_(resume="never")
    run.end("done")
    assert (latest_attempt(folder).state, latest_attempt(folder).reason) == ("done", None)
    assert open_().attempt == 2
    with pytest.raises(UserError, match=r"attempt 2 on .* has taken over"):
        run.check_lock()


def test_another_config_is_refused_before_the_lock_is_acquired(open_: Open, folder: Path) -> None:
    open_().end("done")
    (folder / CHECKPOINT).mkdir(parents=True)
    with pytest.raises(UserError, match=r"optim\.lr: 0\.1 there, 0\.2 now"):
        open_(OTHER_CONFIG)
    assert len(read_attempts(folder)) == 1
    assert (folder / CONFIG).read_text() == HEADER + CONFIG_TEXT


def test_never_archives_the_run_and_starts_with_attempt_1(open_: Open, folder: Path) -> None:
    open_().end("done")
    (folder / STOP).touch()
    run = open_(OTHER_CONFIG, resume="never")
    archive = folder.with_name("run.earlier-1")
    assert printed(run) == f"the earlier run was archived as {archive}\n"
    archived = [(record.state, record.reason) for record in read_attempts(archive)]
    assert archived == [("done", None), ("stopped", "archived")]
    assert run.attempt == 1
    assert not (folder / STOP).exists()
    assert (folder / CONFIG).read_text() == HEADER + OTHER_CONFIG


@pytest.mark.parametrize("restart_count", ["0", "1"])
def test_a_restart_by_torchrun_does_not_archive_the_run(
    restart_count: str, open_: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", restart_count)  # 0 if another node failed
    open_().end("failed", "an error")
    (folder / CHECKPOINT).mkdir(parents=True)
    run = open_(resume="never")
    assert run.attempt == 2
    assert not folder.with_name("run.earlier-1").exists()
    run.end("stopped")
    monkeypatch.undo()
    assert open_(resume="never").attempt == 1


@pytest.mark.parametrize(
    ("state", "is_newer", "stays"),
    [("running", True, True), ("failed", True, True), ("running", False, False), ("stopped", True, False)],
)
def test_a_stop_file_counts_if_the_last_attempt_did_not_obey_it(
    state: Any, is_newer: bool, stays: bool, open_: Open, folder: Path
) -> None:
    open_().end("done")
    killed = dataclasses.replace(latest_attempt(folder), state=state, started=1)
    attempt_path(folder, killed.attempt).write_text(killed.to_json())
    (folder / STOP).touch()
    os.utime(folder / STOP, (2**31, 2**31) if is_newer else (0, 0))
    run = open_()
    assert (folder / STOP).exists() == stays
    assert (f"{folder / STOP}: from before this start, removed" in printed(run)) != stays


def test_an_error_after_the_lock_was_acquired_is_recorded(open_: Open, folder: Path) -> None:
    open_().end("done")
    (folder / STOP).mkdir()  # unlink cannot remove it
    with pytest.raises(UserError, match="asks the run to stop, and cannot be removed"):
        open_()
    assert latest_attempt(folder).state == "failed"
    assert "cannot be removed" in str(latest_attempt(folder).reason)


def test_a_phase_is_recorded_and_has_its_folder(open_: Open, folder: Path) -> None:
    phase = open_(hang_timeout=100.0).start_phase("pretrain", epochs=3)
    assert (phase.folder, phase.root) == (folder / "pretrain", folder)
    record = latest_attempt(folder)
    assert (record.stage, record.step, record.epochs) == ("pretrain", 0, 3)
    assert phase.start_phase("", epochs=5).folder == folder
    (folder / "pretrain").mkdir()
    with phase.watchdog() as heartbeat:
        assert heartbeat.ticks == 0
        assert [path.name for path in (folder / "pretrain" / HANGS).iterdir()] == ["0001-rank-0.txt"]


def test_a_received_signal_stops_between_phases(open_: Open) -> None:
    run = open_()
    run.raise_if_signaled()
    run.signals.received = signal.SIGUSR1
    with pytest.raises(Stopped) as caught:
        run.raise_if_signaled(saved="the end of epoch 1")
    assert (caught.value.reason, caught.value.saved) == ("SIGUSR1", "the end of epoch 1")
    with pytest.raises(Stopped):
        run.start_phase("baseline", epochs=1)


@pytest.mark.parametrize(
    ("error", "state", "reason"),
    [
        (Stopped("SIGTERM"), "stopped", "SIGTERM"),
        (UserError("no room"), "failed", "no room"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt"),
    ],
)
def test_the_end_is_recorded_once(error: BaseException, state: str, reason: str, open_: Open, folder: Path) -> None:
    run = open_()
    rank_1 = dataclasses.replace(run, lock=None)
    rank_1.check_lock()
    rank_1.end("failed")
    rank_1.end_with_error(error)
    assert latest_attempt(folder).state == "running", "ranks without the lock record nothing"
    run.end_with_error(error)
    run.end("done")
    assert (latest_attempt(folder).state, latest_attempt(folder).reason) == (state, reason)
    again = open_()
    folder.rename(folder.with_name("away"))
    again.end_with_error(error)
    (note,) = error.__notes__
    assert note.startswith(f"(the end could not be recorded in {folder} either: {folder} is gone")


def test_a_run_folder_that_is_gone_is_said_once(open_: Open, folder: Path) -> None:
    run = open_()
    folder.rename(folder.with_name("away"))
    with pytest.raises(UserError, match=rf"^{folder} is gone: it was deleted or moved") as caught, saving_to(folder):
        (folder / "checkpoints").mkdir()
    run.end_with_error(caught.value)
    assert not hasattr(caught.value, "__notes__")
