import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.trainer.runs import stop_heartbeat
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
OPTIONS = {"optim": {"lr": 0.5}}


def context(world_size: int = 1) -> Any:
    return SimpleNamespace(world_size=world_size, accelerator=SimpleNamespace(device=torch.device("cpu")))


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[RunLock]:
    attempt = RunLock.acquire(tmp_path / "run", log=print)
    yield attempt
    stop_heartbeat(attempt)


def read_record(attempt: RunLock) -> Any:
    return json.loads((attempt.folder / ENVIRONMENT / "0001.json").read_text(encoding="ascii"))


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
    assert record_environment(attempt.folder, attempt, context(), OPTIONS) is None
    record = read_record(attempt)
    assert record["argv"] == ["python", "trainer/main.py", f"--hub.token={REDACTED}"]
    assert record["working_folder"] == str(Path.cwd())
    assert record["options"] == OPTIONS
    assert record["versions"] == versions()
    assert record["packages"]["torch"] == versions()["torch"]
    assert record["torch"]["threads"] == torch.get_num_threads()
    assert record["git"].keys() in ({"commit", "dirty"}, {"unavailable"})
    (host,) = record["hosts"]
    assert (host["ranks"], host["gpus"], host["memory"] > 1 << 28) == ([0], [], True)
    assert {"NCCL_NET_TOKEN": REDACTED, "REGRAFT_X": "\udcff\n"}.items() <= record["variables"].items()
    assert SECRET not in json.dumps(record)


def test_secrets_in_argv_and_variables_are_redacted() -> None:
    for argv, expected in (
        (["--hub.token", SECRET, "--optim.lr", "1"], ["--hub.token", REDACTED, "--optim.lr", "1"]),
        ([f"--hub.token={SECRET}", "python"], [f"--hub.token={REDACTED}", "python"]),
        ([f"API_KEY={SECRET}", "python"], [f"API_KEY={REDACTED}", "python"]),
        (["--token", "--debug"], ["--token", "--debug"]),
        ([f"--data.root=https://a:{SECRET}@h/x"], [f"--data.root=https://{REDACTED}@h/x"]),
        (["--run.dir", "keys", "--config", "a b.yaml"], ["--run.dir", "keys", "--config", "a b.yaml"]),
    ):
        assert redact_argv(argv) == expected
    kept = {"NCCL_DEBUG": "INFO", "SLURM_JOB_ID": "12"}
    dropped = {"SLURM_JOB_USER": "ada", "HOME": "/home/ada"}
    secret = {"SLURM_JWT": SECRET, "REGRAFT_CACHE": f"s3://k:{SECRET}@bucket"}
    redacted = {"SLURM_JWT": REDACTED, "REGRAFT_CACHE": f"s3://{REDACTED}@bucket"}
    assert select_variables(kept | dropped | secret) == kept | redacted


def test_git_state_of_a_clean_and_of_a_dirty_repository(code_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program, marker = code_file.parents[1] / "program", code_file.parents[1] / "marker"
    program.write_text(f"#!/bin/sh\ntouch '{marker}'\n")
    program.chmod(0o755)
    git(code_file.parent, "config", "core.fsmonitor", str(program))
    commit = git(code_file.parent, "rev-parse", "HEAD")
    os.utime(code_file, (1, 1))
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    (code_file.parent / "untracked.txt").touch()
    assert git_state(code_file) == {"commit": commit, "dirty": False}
    code_file.write_text("lr = 2\n")
    assert git_state(code_file) == {"commit": commit, "dirty": True}
    assert not marker.exists()
    monkeypatch.delenv("GIT_DIR")
    git(code_file.parent, "status")
    assert marker.exists(), "plain git runs the file system monitor"


def test_git_state_says_why_it_is_unavailable(tmp_path: Path, code_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not a git repository" in git_state(tmp_path / "code.py")["unavailable"]
    assert "did not match" in git_state(code_file.with_name("installed.py"))["unavailable"]
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "No such file" in git_state(code_file)["unavailable"]
    hanging_git = tmp_path / "git"
    hanging_git.write_text("#!/bin/sh\nexec /bin/sleep 600\n")
    hanging_git.chmod(0o755)
    monkeypatch.setattr(environment, "COMMAND_TIMEOUT", 0.2)
    assert "timed out" in git_state(code_file)["unavailable"]


def test_rank_0_writes_the_hosts_of_all_ranks(attempt: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    hosts = [{"host": name, "not_collected": {}} for name in ("a", "a", "b", "b")]
    assert merge_by_host(hosts) == [hosts[0] | {"ranks": [0, 1]}, hosts[2] | {"ranks": [2, 3]}]
    monkeypatch.setattr(environment, "gather_object", lambda _: hosts)
    assert record_environment(attempt.folder, None, context(world_size=4), OPTIONS) is None
    assert not (attempt.folder / ENVIRONMENT).exists(), "this rank is not rank 0"
    assert record_environment(attempt.folder, attempt, context(world_size=4), OPTIONS) is None
    assert read_record(attempt)["hosts"] == merge_by_host(hosts)


def test_failures_are_one_line_and_do_not_end_the_run(attempt: RunLock, monkeypatch: pytest.MonkeyPatch) -> None:
    path = attempt.folder / ENVIRONMENT
    monkeypatch.setattr(environment, "distributions", lambda: 1 / 0)
    line = record_environment(attempt.folder, attempt, context(), OPTIONS)
    assert line == f"{path}/0001.json: not collected: packages (ZeroDivisionError: division by zero)"
    assert read_record(attempt)["not_collected"] == {"packages": "ZeroDivisionError: division by zero"}
    assert "packages" not in read_record(attempt)
    path.rename(path.with_name("elsewhere"))
    path.write_text("a file where the folder should be")
    line = record_environment(attempt.folder, attempt, context(), OPTIONS)
    assert str(line).startswith(f"{path}/0001.json: not written: FileExistsError")
    path.unlink()
    attempt.end("stopped", "SIGTERM")
    stop_heartbeat(RunLock.acquire(attempt.folder, log=print))
    assert "attempt 2 on" in str(record_environment(attempt.folder, attempt, context(), OPTIONS))
    assert list(path.iterdir()) == [], "a superseded attempt writes nothing"
