"""launch/contract.py and the trainer say the same of the run folder, the exit codes and the environment."""

import dataclasses
import re
from pathlib import Path

import pytest

from launch import contract
from launch.local.torchrun import TorchrunConfig, trainer_environment
from trainer import main
from trainer.config.parse import QUICKSTART, parse
from trainer.config.schema import RunConfig
from trainer.distributed import error_file, watchdog
from trainer.errors import UserError
from trainer.run import folder, lock

PACKAGES = Path(__file__).resolve().parent.parent


def test_launcher_and_trainer_never_import_each_other() -> None:
    for package, other in (("launch", "trainer"), ("trainer", "launch")):
        for path in (PACKAGES / package).rglob("*.py"):
            found = re.findall(
                rf"^\s*(?:from|import) {other}\b.*", path.read_text(encoding="utf-8"), flags=re.M
            )
            assert not found, f"{path}: {found}"


def test_exit_codes() -> None:
    assert (contract.FAILED, contract.USER_ERROR, contract.STOPPED, contract.INTERRUPTED) == (
        main.FAILED,
        main.USER_ERROR,
        main.STOPPED,
        main.INTERRUPTED,
    )


def test_names_in_the_run_folder_and_the_environment() -> None:
    assert contract.ATTEMPTS == lock.ATTEMPTS
    assert contract.STOP == folder.STOP
    assert contract.STOP_FILE in (PACKAGES / "trainer" / "keeper.py").read_text(encoding="utf-8")
    assert contract.HANGS == watchdog.HANGS
    assert contract.METRICS == folder.METRICS
    assert contract.LOG_FOLDER == folder.LOG_FOLDER
    assert RunConfig().dir == contract.DEFAULT_RUN_DIR
    assert contract.trainer_folder() == PACKAGES / "trainer"


def test_what_the_launcher_reads_of_an_attempt_is_what_the_trainer_writes(tmp_path: Path) -> None:
    assert contract.latest_attempt(tmp_path) is None
    assert contract.last_number(tmp_path) == 0
    attempt = lock.RunLock.acquire(tmp_path, log=print)
    attempt.update(step=3, steps=12, epoch=1, epochs=4)
    attempt.end("stopped", "SIGTERM")
    lock.RunLock.acquire(tmp_path, log=print).end("failed", "x: y")
    found = contract.latest_attempt(tmp_path)
    assert found is not None
    assert (found.attempt, found.state, found.reason) == (2, "failed", "x: y")
    assert contract.last_number(tmp_path) == 2
    (tmp_path / "attempts" / "0002.json").unlink()
    found = contract.latest_attempt(tmp_path)
    assert found is not None
    written = {**dataclasses.asdict(attempt.record)}
    read = dataclasses.asdict(found)
    assert {key: read[key] for key in read if key != "seen"} == {
        key: written[key] for key in read if key != "seen"
    }


def test_an_error_that_is_the_users_is_told_apart(tmp_path: Path) -> None:
    from launch.failures import first_failure

    for name, error, is_user_error in (
        ("a", UserError("x is 3: expected 4"), True),
        ("b", ValueError("no"), False),
    ):
        folder = tmp_path / name / "id_x" / "attempt_0" / "0"
        folder.mkdir(parents=True)
        error_file.write_error_file(error, {error_file.ERROR_FILE: str(folder / "error.json")})
        found = first_failure(tmp_path / name, host="h")
        assert found.is_user_error is is_user_error
        assert str(error) in found.error


def test_the_rank_among_all_machines_is_told(tmp_path: Path) -> None:
    from launch.failures import first_failure

    folder = tmp_path / "id_x" / "attempt_0" / "1"
    folder.mkdir(parents=True)
    place = {error_file.ERROR_FILE: str(folder / "error.json"), "RANK": "5"}
    error_file.write_error_file(ValueError("no"), place)
    assert first_failure(tmp_path, host="h").rank == 5
    error_file.write_error_file(ValueError("an echo"), place)
    assert first_failure(tmp_path, host="h").error == "ValueError: no", "what was said first is the cause"


def test_no_launch_writes_among_the_logs_of_another(tmp_path: Path) -> None:
    assert contract.new_logs(tmp_path) == tmp_path / "logs" / "0001"
    (tmp_path / "logs" / "0003-job-7.0").mkdir(parents=True)
    assert contract.new_logs(tmp_path).name == "0004"
    for _ in range(5):
        lock.RunLock.acquire(tmp_path, log=print).end("stopped")
    assert contract.new_logs(tmp_path).name == "0006"


def test_the_log_folder_is_handed_to_the_trainer(tmp_path: Path) -> None:
    config = TorchrunConfig(
        processes=1, threads=1, max_restarts=0, trainer=tmp_path, options=(), logs=tmp_path / "logs"
    )
    assert trainer_environment(config, {})[folder.LOG_FOLDER] == str(tmp_path / "logs")


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--data.root", "x"],
        ["--data.root=x", "--run.dir", "a/b"],
        ["--data.root=x", "--run.dir=a/b"],
        ["--config", "F"],
        ["--config=F"],
        ["--config=F", "--run.dir=here"],
        ["--run.dir=here", "--config=F"],  # from left to right: the file's wins
        ["--config=F", "--data.root=x"],
        ["--run.dir=~/x", "--data.root=x"],
        ["--run", '{"dir": "by/section"}', "--data.root=x"],
        ['--run={"dir": "by/section"}', "--data.root=x", "--run.seed=3"],
    ],
    ids=" ".join,
)
def test_both_find_the_same_run_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text("run:\n  dir: of/the file\ndata:\n  root: there\n")
    found = Path(parse(words).run.dir).expanduser().absolute()
    assert contract.run_folder(words) == found
    assert QUICKSTART.exists()
