"""What one of the packages `trainer` and `launch` writes, the other one reads."""

from pathlib import Path

import pytest

from launch.failures import first_failure
from launch.trainer_options import new_logs, run_folder
from regraft.contract import ERROR_FILE
from trainer.config.parse import parse
from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError
from trainer.run.lock import RunLock


@pytest.mark.parametrize(
    ("error", "is_user_error"), [(UserError("x is 3: expected 4"), True), (ValueError("no"), False)]
)
def test_launcher_reads_the_error_file_that_the_trainer_writes(
    error: Exception, is_user_error: bool, tmp_path: Path
) -> None:
    folder = tmp_path / "id_x" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    environment = {ERROR_FILE: str(folder / "error.json"), "RANK": "5"}
    write_error_file(error, environment)
    write_error_file(ValueError("an echo"), environment)  # the first error is the cause
    failure = first_failure(tmp_path, host="h")
    assert (failure.is_user_error, failure.rank) == (is_user_error, 5)
    assert str(error) in failure.error


def test_each_launch_has_a_log_folder_of_its_own(tmp_path: Path) -> None:
    assert new_logs(tmp_path) == tmp_path / "logs" / "0001"
    (tmp_path / "logs" / "0003-job-7.0").mkdir(parents=True)
    assert new_logs(tmp_path).name == "0004"
    for _ in range(5):
        RunLock.acquire(tmp_path, log=print).end("stopped")
    assert new_logs(tmp_path).name == "0006"


@pytest.mark.parametrize(
    "command",
    [
        "",
        "--data.root=x",
        "--data.root=x --run.dir a/b",
        "--data.root x --run.dir=a/b",
        "--config F",
        "--config=F --run.dir=here",
        "--run.dir=here --config=F",  # from left to right: the file's wins
        "--config=F --data.root=x",
        "FOLDER",
        "--debug FOLDER --run.dir=here",
        "--config configs/hotdog.yaml",
        "--run.dir=~/x --data.root=x",
    ],
)
def test_launcher_and_trainer_find_the_same_run_folder(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text("run:\n  dir: of/the file\ndata:\n  root: there\n")
    argv = command.split()
    assert run_folder(argv) == Path(parse(argv).run.dir).expanduser().absolute()
