import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from regraft.contract import read_attempts
from tests.folders import image_folder
from tests.trainer.runs import stop_heartbeat
from trainer.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.distributed.signals import StopSignals
from trainer.pipeline import run
from trainer.run import environment
from trainer.run.environment import (
    ENVIRONMENT,
    REDACTED,
    git_state,
    merge_by_host,
    record_environment,
    redact_argv,
    select_variables,
)
from trainer.run.lock import RunLock
from trainer.run.versions import versions

SECRET = "hunter2-correct-horse"


def context(world_size: int = 1) -> Any:
    return SimpleNamespace(world_size=world_size, accelerator=SimpleNamespace(device=torch.device("cpu")))


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[RunLock]:
    attempt = RunLock.acquire(tmp_path / "run", log=print)
    yield attempt
    stop_heartbeat(attempt)


def read_record(attempt: RunLock) -> Any:
    path = attempt.folder / ENVIRONMENT / f"{attempt.record.attempt:04}.json"
    return json.loads(path.read_text(encoding="ascii"))


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def code_file(tmp_path: Path) -> Path:
    """Return a committed file in a repository."""
    file = tmp_path / "a repository" / "code.py"
    file.parent.mkdir()
    file.write_text("lr = 1\n")
    git(file.parent, "init", "--quiet")
    git(file.parent, "add", ".")
    git(file.parent, "commit", "--quiet", "-m", "first")
    return file


def test_record_holds_command_versions_hardware_and_redacted_variables(
    attempt: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NCCL_NET_TOKEN", SECRET)
    monkeypatch.setenv("REGRAFT_X", "\udcff\n")
    monkeypatch.setattr(sys, "orig_argv", ["python", "trainer/main.py", f"--hub.token={SECRET}"])
    assert record_environment(attempt.folder, attempt, context()) is None
    record = read_record(attempt)
    assert record["argv"] == ["python", "trainer/main.py", f"--hub.token={REDACTED}"]
    assert record["working_folder"] == str(Path.cwd())
    assert record["versions"] == versions()
    assert record["packages"]["torch"] == versions()["torch"]
    assert record["torch"]["threads"] == torch.get_num_threads()
    assert record["git"].keys() in ({"commit", "dirty"}, {"unavailable"})
    (host,) = record["hosts"]
    assert (host["ranks"], host["gpus"], host["memory"] > 1 << 28) == ([0], [], True)
    assert record["variables"]["NCCL_NET_TOKEN"] == REDACTED
    assert record["variables"]["REGRAFT_X"] == "\udcff\n"
    assert SECRET not in json.dumps(record)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["--hub.token", SECRET, "--optim.lr", "1"], ["--hub.token", REDACTED, "--optim.lr", "1"]),
        ([f"--hub.token={SECRET}", "python"], [f"--hub.token={REDACTED}", "python"]),
        ([f"API_KEY={SECRET}", "python"], [f"API_KEY={REDACTED}", "python"]),
        (["--token", "--debug"], ["--token", "--debug"]),
        ([f"--data.root=https://a:{SECRET}@h/x"], [f"--data.root=https://{REDACTED}@h/x"]),
        (["--run.dir", "keys", "--config", "a b.yaml"], ["--run.dir", "keys", "--config", "a b.yaml"]),
    ],
)
def test_argv_is_redacted(argv: list[str], expected: list[str]) -> None:
    assert redact_argv(argv) == expected


def test_variables_are_selected_by_prefix_and_redacted() -> None:
    variables = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_USER": "ada",
        "SLURM_JWT": SECRET,
        "NCCL_DEBUG": "INFO",
        "HOME": "/home/ada",
        "REGRAFT_CACHE": f"s3://k:{SECRET}@bucket",
    }
    assert select_variables(variables) == {
        "NCCL_DEBUG": "INFO",
        "REGRAFT_CACHE": f"s3://{REDACTED}@bucket",
        "SLURM_JOB_ID": "12",
        "SLURM_JWT": REDACTED,
    }


def test_git_state_of_a_clean_and_of_a_dirty_repository(code_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    commit = subprocess.check_output(
        ["git", f"--git-dir={code_file.parent}/.git", "rev-parse", "HEAD"], text=True
    ).strip()
    (code_file.parent / "untracked.txt").touch()
    assert git_state(code_file) == {"commit": commit, "dirty": False}
    code_file.write_text("lr = 2\n")
    assert git_state(code_file) == {"commit": commit, "dirty": True}


def test_git_state_runs_no_hook_and_no_file_system_monitor(code_file: Path) -> None:
    program, marker = code_file.parents[1] / "program", code_file.parents[1] / "marker"
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    program.chmod(0o755)
    git(code_file.parent, "config", "core.fsmonitor", str(program))
    os.utime(code_file, (1, 1))
    assert git_state(code_file)["dirty"] is False
    assert not marker.exists()
    git(code_file.parent, "status")
    assert marker.exists(), "plain git runs it"


def test_git_state_says_why_it_is_unavailable(tmp_path: Path, code_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not a git repository" in git_state(tmp_path / "code.py")["unavailable"]
    assert "did not match" in git_state(code_file.with_name("installed.py"))["unavailable"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No such file" in git_state(code_file)["unavailable"]
    hanging_git = tmp_path / "git"
    hanging_git.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    hanging_git.chmod(0o755)
    monkeypatch.setattr(environment, "COMMAND_TIMEOUT", 0.2)
    start = time.monotonic()
    assert "timed out" in git_state(code_file)["unavailable"]
    assert time.monotonic() - start < 60


def test_rank_0_writes_the_hosts_of_all_ranks(attempt: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [{"host": name, "not_collected": {}} for name in ("a", "a", "b", "b")]
    assert merge_by_host(hosts) == [hosts[0] | {"ranks": [0, 1]}, hosts[2] | {"ranks": [2, 3]}]
    monkeypatch.setattr(environment, "gather_object", lambda _: hosts)
    assert record_environment(attempt.folder, None, context(world_size=4)) is None
    assert not (attempt.folder / ENVIRONMENT).exists(), "this rank is not rank 0"
    assert record_environment(attempt.folder, attempt, context(world_size=4)) is None
    assert read_record(attempt)["hosts"] == merge_by_host(hosts)


def test_superseded_attempt_writes_nothing(attempt: RunLock) -> None:
    attempt.end("stopped", "SIGTERM")
    stop_heartbeat(RunLock.acquire(attempt.folder, log=print))
    message = record_environment(attempt.folder, attempt, context())
    assert message is not None
    assert "attempt 2 on" in message
    assert list((attempt.folder / ENVIRONMENT).iterdir()) == []


def test_failures_are_one_line_and_do_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run"), device="cpu", threads=1),
        data=DataConfig(root=str(root), image_size=32, num_workers=0, cache=str(tmp_path / "cache")),
        model=ModelConfig(name="squeezenet1_1", weights=None),
        train=TrainConfig(epochs=1, batch_size=4),
    )
    path = tmp_path / "run" / ENVIRONMENT
    threads = torch.get_num_threads()
    with StopSignals() as signals:
        monkeypatch.setattr(environment, "distributions", lambda: 1 / 0)
        run(config, signals)
        record = json.loads((path / "0001.json").read_text())
        path.rename(path.with_name("elsewhere"))
        path.write_text("a file where the folder should be")
        run(replace(config, train=TrainConfig(epochs=2, batch_size=4)), signals)
    torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert f"{path}/0001.json: not collected: packages (ZeroDivisionError: division by zero)" in lines
    assert any(line.startswith(f"{path}/0002.json: not written: FileExistsError") for line in lines)
    assert record["not_collected"] == {"packages": "ZeroDivisionError: division by zero"}
    assert "packages" not in record
    assert [attempt.state for attempt in read_attempts(tmp_path / "run")] == ["done", "done"]
