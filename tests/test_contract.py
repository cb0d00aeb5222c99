"""What the launcher reads is what the trainer writes: attempts, errors, logs and the run folder."""

from pathlib import Path

import pytest

from launch.contract import new_logs, run_folder
from launch.failures import first_failure
from regraft.contract import DEFAULT_RUN_DIR, ERROR_FILE, latest_attempt, latest_attempt_number
from trainer.config.parse import parse
from trainer.config.schema import RunConfig
from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError
from trainer.run.lock import RunLock


def test_the_latest_attempt_is_read_as_it_was_recorded(tmp_path: Path) -> None:
    assert latest_attempt(tmp_path) is None
    assert latest_attempt_number(tmp_path) == 0
    for number in (1, 2):
        lock = RunLock.acquire(tmp_path, log=print)
        lock.update(step=3, steps=12, epoch=1, epochs=4)
        lock.end("stopped", "SIGTERM")
        assert latest_attempt(tmp_path) == lock.record
        assert latest_attempt_number(tmp_path) == lock.record.attempt == number


def test_the_first_error_is_the_cause_with_its_rank(tmp_path: Path) -> None:
    for name, error in {"user": UserError("x is 3: expected 4"), "other": ValueError("no")}.items():
        path = tmp_path / name / "id_x" / "attempt_0" / "1" / "error.json"
        path.parent.mkdir(parents=True)
        for raised in (error, ValueError("a secondary error")):
            write_error_file(raised, {ERROR_FILE: str(path), "RANK": "5"})
        failure = first_failure(tmp_path / name, host="h")
        assert (failure.rank, failure.is_user_error) == (5, name == "user")
        assert str(error) in failure.error


def test_every_start_gets_a_log_folder_of_its_own(tmp_path: Path) -> None:
    assert new_logs(tmp_path) == tmp_path / "logs" / "0001"
    (tmp_path / "logs" / "0003-job-7.0").mkdir(parents=True)
    assert new_logs(tmp_path).name == "0004"
    for _ in range(5):
        RunLock.acquire(tmp_path, log=print).end("stopped")
    assert new_logs(tmp_path).name == "0006"


@pytest.mark.parametrize(
    "options",
    [
        [],
        ["--data.root", "x"],
        ["--data.root=x", "--run.dir", "a/b"],
        ["--data.root=x", "--run.dir=a/b"],
        ["--config", "F"],
        ["--config=F", "--run.dir=here"],
        ["--run.dir=here", "--config=F"],  # the last one counts
        ["--config=F", "--data.root=x"],
        ["--run.dir=~/x", "--data.root=x"],
        ["--run", '{"dir": "by/section"}', "--data.root=x"],
        ['--run={"dir": "by/section"}', "--data.root=x", "--run.seed=3"],
    ],
    ids=" ".join,
)
def test_launcher_and_trainer_find_the_same_run_folder(
    options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text("run:\n  dir: of/the file\ndata:\n  root: there\n")
    assert run_folder(options) == Path(parse(options).run.dir).expanduser().absolute()
    assert RunConfig().dir == DEFAULT_RUN_DIR
