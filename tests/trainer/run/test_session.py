import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from regraft.contract import ATTEMPTS, CHECKPOINTS, CONFIG, STOP, attempt_path, read_attempts
from trainer.distributed.context import DistributedContext
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError
from trainer.run.lock import RunLock
from trainer.run.session import OpenRun, open_run

Open = Callable[..., OpenRun]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run"


@pytest.fixture
def printed() -> io.StringIO:
    return io.StringIO()


@pytest.fixture
def start(folder: Path, printed: io.StringIO, ctx: DistributedContext) -> Open:
    """Return a function that opens the run folder."""

    def start(resume: Any = "auto", *, seed: int = 0) -> OpenRun:
        return open_run(
            folder,
            f"run:\n  seed: {seed}\n",
            resume=resume,
            ctx=ctx,
            console=Console(file=printed, width=10_000),
            signals=StopSignals(),
            hang_timeout=None,
        )

    return start


def finish(run: OpenRun, state: Any = "done") -> None:
    """End a start that has saved a checkpoint; `running` leaves the record of a killed process."""
    (run.folder / CHECKPOINTS / "step-00000001-epoch-0001").mkdir(parents=True, exist_ok=True)
    run.end("done")
    record = replace(read_attempts(run.folder)[-1], state=state, started=1)
    attempt_path(run.folder, record.attempt).write_text(record.to_json())


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_a_running_run_is_neither_joined_nor_archived(resume: str, start: Open, folder: Path) -> None:
    start().end("done")
    running = RunLock.acquire(folder, log=print)
    (folder / STOP).touch()
    with pytest.raises(
        UserError, match=f"attempt 2 of this run is still running .process {running.record.pid} on"
    ):
        start(resume)
    assert sorted(path.name for path in folder.iterdir()) == sorted([STOP, ATTEMPTS, CONFIG])
    assert [path.name for path in folder.parent.glob("run*")] == ["run"]
    assert len(read_attempts(folder)) == 2
    running.end("done")


def test_resume_never_archives_the_run_of_a_killed_process(
    start: Open, folder: Path, printed: io.StringIO
) -> None:
    finish(start(), "running")
    (record,) = read_attempts(folder)
    start("never").end("done")
    assert f"{folder}.earlier-1" in printed.getvalue()
    assert [(record.attempt, record.state) for record in read_attempts(folder)] == [(1, "done")]
    assert read_attempts(folder.with_name("run.earlier-1"))[0] == record


def test_resume_never_archives_once_for_each_launch_of_torchrun(
    start: Open, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish(start())
    first, second = (folder.with_name(f"run.earlier-{number}") for number in (1, 2))
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one launch")
    finish(start("never"))
    assert first.exists()
    finish(start("never"))  # by the same parent, in the same launch
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another launch")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    finish(start("never"))
    assert not second.exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "a third launch")
    finish(start("never"))
    assert second.exists()


def test_a_refused_config_takes_no_attempt_number(start: Open, folder: Path) -> None:
    finish(start())
    with pytest.raises(UserError, match=r"run\.seed: 0 there, 1 now"):
        start(seed=1)
    assert len(read_attempts(folder)) == 1


@pytest.mark.parametrize(
    ("state", "is_obeyed"),
    [(None, False), ("running", True), ("failed", True), ("stopped", False), ("done", False)],
)
def test_a_stop_file_counts_only_if_it_was_made_after_a_start_that_was_killed(
    state: str | None, is_obeyed: bool, start: Open, folder: Path, printed: io.StringIO
) -> None:
    folder.mkdir()
    if state:
        finish(start(), state)
    (folder / STOP).touch()
    start().end("done")
    assert (folder / STOP).exists() == is_obeyed
    assert (f"{folder / STOP}: from before this start, removed" in printed.getvalue()) != is_obeyed
