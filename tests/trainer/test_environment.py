import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.folders import image_folder
from trainer import environment, git, hardware
from trainer.config.schema import Config, DataConfig, ModelConfig, RunConfig, TrainConfig
from trainer.distributed import context
from trainer.distributed.signals import StopSignals
from trainer.environment import ENVIRONMENT, changes, chosen, diffs, keep, launchers, together
from trainer.masking import MASK, masked_text, masked_variables, masked_words
from trainer.pipeline import run
from trainer.run.lock import RunLock, read_attempts

SECRET = "hunter2-correct-horse"

# --- secrets


@pytest.mark.parametrize(
    "text",
    [
        f"https://user:{SECRET}@example.org/x.git",
        f"https://{SECRET}@example.org/x.git",
        f"postgres://a:{SECRET}@p@host/db",
        f"+    password = '{SECRET}'",
        f'+    "api_key": "{SECRET}",',
        f"+export WANDB_API_KEY={SECRET}",
        f"-AWS_SECRET_ACCESS_KEY: {SECRET}",
        f"+def log_in(token: str = '{SECRET}') -> None:",
        f"+passwd={SECRET}",
        f"KEY={SECRET}",
        f'+AUTH = "{SECRET}"',
        f"+session_cookie = '{SECRET}'",
        f'+password = """{SECRET}"""',
        f'+PASSWORD = ("{SECRET}"',
        f'+jwt = "{SECRET} and the rest was cut',
        f"Authorization: Bearer {SECRET}",
        f"client.secret={SECRET}",
        "hf_" + "a1B2" * 8 + " is mine",
        "clone with ghp_" + "x9" * 18,
        f"-----BEGIN RSA PRIVATE KEY-----\n+{SECRET}\n-----END RSA PRIVATE KEY-----",
        f"+-----BEGIN OPENSSH PRIVATE KEY-----\n+{SECRET}\n",
    ],
)
def test_what_looks_like_a_secret_is_masked_in_any_text(text: str) -> None:
    masked = masked_text(text)
    assert SECRET not in masked
    assert MASK in masked
    assert "hf_a1" not in masked
    assert "ghp_" not in masked


@pytest.mark.parametrize(
    "text",
    [
        "+    lr = 1e-3",
        "+    rows = sorted(rows, key=lambda row: row.step)",
        "+    keys = ('a', 'b')",
        "https://example.org/a@b/c",
        "user@example.org",
        "+    max_tokens = 512",
        "+    token: str | None",
        "+    password=None",
        "+++ b/trainer/checkpoint/manager.py",
    ],
)
def test_what_is_none_is_left(text: str) -> None:
    assert masked_text(text) == text


@pytest.mark.parametrize(
    "run",
    [
        "lease_id",
        "-eyJ",
        "a.",
        "token=",
        "x-key ",
        "-----BEGIN ",
        "://",
        "Bearer ",
        "sk-",
        "token\t",
        '"lease_id":"',
        "KEY: a",
    ],
)
def test_a_line_without_end_takes_no_time_without_end(run: str) -> None:
    masked_text(run * (1_000_000 // len(run)))  # an hour, were it quadratic: pytest would end it


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--hub.token", SECRET, "--optim.lr", "1"], ["--hub.token", MASK, "--optim.lr", "1"]),
        ([f"--hub.token={SECRET}"], [f"--hub.token={MASK}"]),
        ([f"API_KEY={SECRET}", "python"], [f"API_KEY={MASK}", "python"]),
        (["--token", "--debug"], ["--token", "--debug"]),
        ([f"--data.root=https://a:{SECRET}@h/x"], [f"--data.root=https://{MASK}@h/x"]),
        (["--run.dir", "keys", "--config", "a b.yaml"], ["--run.dir", "keys", "--config", "a b.yaml"]),
    ],
)
def test_a_command_line_is_kept_without_its_secrets(words: list[str], expected: list[str]) -> None:
    assert masked_words(words) == expected


def test_variables_that_matter_are_kept_and_none_that_name_a_person() -> None:
    given = {
        "SLURM_JOB_ID": "12",
        "SLURM_JOB_USER": "ada",
        "SLURM_JWT": SECRET,
        "NCCL_DEBUG": "INFO",
        "HOME": "/home/ada",
        "TORCH_HUB_TOKEN": SECRET,
        "REGRAFT_CACHE": f"s3://k:{SECRET}@bucket",
    }
    assert masked_variables(chosen(given)) == {
        "NCCL_DEBUG": "INFO",
        "REGRAFT_CACHE": f"s3://{MASK}@bucket",
        "SLURM_JOB_ID": "12",
        "SLURM_JWT": MASK,
        "TORCH_HUB_TOKEN": MASK,
    }


# --- git


def run_git(folder: Path, *words: str) -> str:
    alone = {"GIT_CONFIG_GLOBAL": "/dev/null", "GIT_CONFIG_SYSTEM": "/dev/null"}
    who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "init.defaultBranch=main"]
    done = subprocess.run(
        ["git", *who, *words],
        cwd=folder,
        env={**os.environ, **alone},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    folder = tmp_path / "a repository"
    folder.mkdir()
    run_git(folder, "init", "--quiet")
    (folder / "code.py").write_text("lr = 1\n")
    run_git(folder, "add", ".")
    run_git(folder, "commit", "--quiet", "-m", "first")
    return folder


def test_a_clean_repository_is_its_commit_and_branch(repository: Path) -> None:
    run_git(repository, "remote", "add", "origin", f"https://me:{SECRET}@example.org/x.git")
    found = git.look(repository)
    assert found.commit == run_git(repository, "rev-parse", "HEAD")
    assert (found.branch, found.root) == ("main", repository)
    assert found.remote == f"https://{MASK}@example.org/x.git"
    assert (found.dirty, found.diff, found.untracked) == (False, b"", ())


def test_what_is_not_committed_is_kept_masked_and_untracked_files_by_name_alone(repository: Path) -> None:
    (repository / "code.py").write_text(f"lr = 2\npassword = '{SECRET}'\n")
    (repository / "staged.py").write_text("new\n")
    run_git(repository, "add", "staged.py")
    (repository / "private.txt").write_text(SECRET)
    (repository / "Bücher\n2").write_text("")
    below = repository / "below"
    below.mkdir()
    found = git.look(below)
    assert found.changed == ("code.py", "staged.py")
    assert set(found.untracked) == {"private.txt", "Bücher\n2"}
    assert b"+lr = 2" in found.diff
    assert b"+new" in found.diff
    assert SECRET.encode() not in found.diff
    assert not found.cut
    text = diffs([found]).decode()
    assert text.startswith(f"# {repository} at {found.commit}")


def test_a_diff_can_be_applied_again_where_nothing_was_masked(repository: Path) -> None:
    (repository / "code.py").write_bytes("lr = 2  # größer\n".encode("latin-1"))  # no UTF-8
    (repository / "kept.diff").write_bytes(diffs([git.look(repository)]))
    run_git(repository, "stash", "--quiet")
    run_git(repository, "apply", "kept.diff")
    assert (repository / "code.py").read_bytes() == "lr = 2  # größer\n".encode("latin-1")


def test_of_many_files_the_first_are_named_and_the_rest_counted(repository: Path) -> None:
    for number in range(203):
        (repository / f"{number:03}.txt").touch()
    found = git.look(repository)
    assert found.untracked[-2:] == ("199.txt", "... and 3 more")


def test_a_long_diff_is_cut_and_says_so(repository: Path) -> None:
    (repository / "code.py").write_text("x = 1\n" * 50_000)
    found = git.look(repository, most_bytes=10_000)
    assert found.cut
    assert len(found.diff) == 10_000
    assert diffs([found]).decode().splitlines()[-1] == "# cut here: the first 10,000 bytes are kept"
    other = git.look(repository, most_bytes=20_000)
    assert (other.cut, len(other.diff)) == (True, 20_000)


def test_no_program_that_a_repository_names_is_run(repository: Path) -> None:
    ran = repository.parent / "ran"
    program = repository.parent / "program"
    program.write_text(f"#!/bin/sh\necho \"$0 $*\" >> '{ran}'\ncat\n")
    program.chmod(0o755)
    (repository / ".gitattributes").write_text("*.py diff=mine filter=a=b.c\n*.txt filter=lfs\n")
    hooks = repository / ".git" / "hooks"
    hooks.mkdir(exist_ok=True)
    (repository / "some.txt").write_text("a\n")
    run_git(repository, "add", ".")
    run_git(repository, "commit", "--quiet", "-m", "second")
    settings = {
        "core.fsmonitor": str(program),
        "core.pager": str(program),
        "pager.diff": str(program),
        "pager.status": str(program),
        "diff.external": str(program),
        "diff.mine.command": str(program),
        "diff.mine.textconv": str(program),
        "filter.a=b.c.clean": str(program),
        "filter.lfs.process": str(program),
        "filter.lfs.required": "true",
        "core.hooksPath": str(hooks),
        "core.sshCommand": str(program),
    }
    for name in ("post-index-change", "pre-commit", "fsmonitor-watchman"):
        (hooks / name).symlink_to(program)
    with (repository / ".git" / "config").open("a") as file:
        for name, value in settings.items():
            section, _, rest = name.partition(".")
            sub, _, key = rest.rpartition(".")
            file.write(f'[{section} "{sub}"]\n' if sub else f"[{section}]\n")
            file.write(f'\t{key} = "{value}"\n')
    for name in ("code.py", "some.txt"):
        (repository / name).write_text("lr = 2\n")
        os.utime(repository / name, (1, 1))
    found = git.look(repository)
    assert set(found.changed) == {"code.py", "some.txt"}
    assert found.diff.count(b"+lr = 2") == 2
    assert not ran.exists(), ran.read_text()
    # What the test sets would run: else it shows nothing.
    subprocess.run(["git", "status"], cwd=repository, capture_output=True, check=False)
    subprocess.run(["git", "diff"], cwd=repository, capture_output=True, check=False)
    assert ran.exists()


def test_variables_of_another_repository_do_not_lead_astray(
    repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_DIR", "/nowhere")
    monkeypatch.setenv("GIT_EXTERNAL_DIFF", "/bin/false")
    assert git.look(repository).branch == "main"


def test_without_git_a_repository_or_a_commit_it_says_which(
    tmp_path: Path, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    bare = tmp_path / "bare"
    bare.mkdir()
    with pytest.raises(git.GitFailed, match="not a git repository"):
        git.look(bare)
    run_git(bare, "init", "--quiet")
    assert git.look(bare).commit == ""
    monkeypatch.setenv("PATH", str(bare))
    with pytest.raises(git.GitFailed, match="git cannot be started"):
        git.look(repository)


def test_a_git_that_hangs_is_not_waited_for(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow = tmp_path / "bin" / "git"
    slow.parent.mkdir()
    slow.write_text("#!/bin/sh\nexec sleep 600\n")
    slow.chmod(0o755)
    monkeypatch.setenv("PATH", str(slow.parent), prepend=os.pathsep)
    began = time.monotonic()
    with pytest.raises(git.GitFailed, match="took too long"):
        git.look(repository, seconds=0.2)
    assert time.monotonic() - began < 60


# --- what is written


@pytest.fixture
def ctx() -> Iterator[Any]:
    threads = torch.get_num_threads()
    yield context.start(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


@pytest.fixture
def attempt(tmp_path: Path) -> Iterator[RunLock]:
    found = RunLock.acquire(tmp_path / "run", log=print)
    yield found
    found._over.set()


def read(attempt: RunLock) -> dict[str, Any]:
    path = attempt.folder / ENVIRONMENT / f"{attempt.record.attempt:04}.json"
    found = json.loads(path.read_text(encoding="ascii"))
    assert isinstance(found, dict)
    return found


def test_a_start_is_written_down(
    attempt: RunLock, ctx: Any, monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    (repository / "code.py").write_text("lr = 2\n")
    monkeypatch.chdir(repository)
    monkeypatch.setenv("NCCL_NET_TOKEN", SECRET)
    monkeypatch.setenv("REGRAFT_X", "\udcff\n")
    monkeypatch.setattr(sys, "orig_argv", ["python", "trainer/main.py", f"--hub.token={SECRET}"])
    assert keep(attempt.folder, attempt, ctx) is None
    found = read(attempt)
    assert found["command"] == ["python", "trainer/main.py", f"--hub.token={MASK}"]
    assert found["folder"] == str(repository)
    assert found["working_folder"]["dirty"] is True
    assert len(found["working_folder"]["commit"]) == 40
    assert found["packages"]["torch"] in torch.__version__
    assert found["torch"]["threads"] == 1
    assert found["hosts"][0]["ranks"] == [0]
    assert found["hosts"][0]["memory"] > 1 << 28
    assert found["variables"]["NCCL_NET_TOKEN"] == MASK
    assert found["variables"]["REGRAFT_X"] == "\\xff\\n"
    names = {path.name for path in (attempt.folder / ENVIRONMENT).iterdir()}
    assert names == {"0001.json", "0001.diff"}
    assert "+lr = 2" in (attempt.folder / ENVIRONMENT / "0001.diff").read_text()
    for path in attempt.folder.rglob("*.*"):
        assert SECRET not in path.read_text()


def test_the_code_is_the_repository_that_holds_it_not_one_that_it_is_installed_below(
    repository: Path, tmp_path: Path
) -> None:
    installed = repository / "venv" / "trainer"
    installed.mkdir(parents=True)
    (installed / "main.py").touch()
    _, told = environment._repository(installed / "main.py")
    assert told == {"git": "the code is installed; no repository tracks it"}
    found, told = environment._repository(repository / "code.py")
    assert found is not None
    assert told["commit"] == found.commit


def test_an_attempt_that_was_taken_over_writes_nothing(attempt: RunLock, ctx: Any) -> None:
    attempt.end("stopped", "SIGTERM")
    RunLock.acquire(attempt.folder, log=print)._over.set()
    told = keep(attempt.folder, attempt, ctx)
    assert told is not None
    assert "attempt 2 on" in told
    assert list((attempt.folder / ENVIRONMENT).iterdir()) == []


def test_that_it_cannot_be_written_is_one_line_and_no_end(
    attempt: RunLock, ctx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (attempt.folder / ENVIRONMENT).write_text("in the way")
    told = keep(attempt.folder, attempt, ctx)
    assert told is not None
    assert "\n" not in told
    assert "could not be written down: FileExistsError" in told

    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("x\ny")

    monkeypatch.setattr(environment, "hardware", broken)
    (attempt.folder / ENVIRONMENT).unlink()
    assert keep(attempt.folder, attempt, ctx) is None
    assert read(attempt)["hosts"][0]["error"] == "ZeroDivisionError: x\\ny"


def test_the_next_start_says_what_has_changed(
    attempt: RunLock, ctx: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert keep(attempt.folder, attempt, ctx) is None
    attempt.end("stopped", "SIGTERM")
    second = RunLock.acquire(attempt.folder, log=print)
    second._over.set()
    assert keep(attempt.folder, second, ctx) is None, "nothing has"
    first = attempt.folder / ENVIRONMENT / "0001.json"
    (attempt.folder / ENVIRONMENT / "0002.json").unlink()
    facts = json.loads(first.read_text())
    facts["hosts"][0] |= {"cpu": "Another CPU", "gpus": [{"name": "A100"}]}
    first.write_text(json.dumps(facts))
    told = keep(attempt.folder, second, ctx)
    assert told is not None
    assert told.startswith("since the attempt before: the processor: Another CPU then, ")
    assert "the GPUs: A100 then, none now" in told
    first.write_text("[1")
    assert keep(attempt.folder, second, ctx) is None, "a damaged file says nothing"
    for foreign in ('{"hosts": 3, "code": []}', "[]", '{"hosts": [{"gpus": [1]}], "code": {}}'):
        first.write_text(foreign)
        assert keep(attempt.folder, second, ctx) is None, "nor does one of another version"


@pytest.mark.parametrize(
    ("then", "now", "expected"),
    [
        ({"commit": "a" * 40}, {"commit": "b" * 40}, ["the code's commit was aaaaaaaaaa, is bbbbbbbbbb"]),
        ({"git": "no"}, {"commit": "b" * 40}, ["the code's commit was none, is bbbbbbbbbb"]),
        (
            {"commit": "a", "diff_sha256": "1"},
            {"commit": "a", "diff_sha256": "2"},
            ["what is not committed of the code has changed"],
        ),
        ({"commit": "a", "diff_sha256": "1"}, {"commit": "a", "diff_sha256": "1"}, []),
    ],
)
def test_other_code_is_a_change(then: Mapping[str, str], now: Mapping[str, str], expected: list[str]) -> None:
    assert changes({"code": then}, {"code": now}) == expected
    assert changes(None, {"code": now}) == []


def test_hosts_are_told_once_with_their_ranks() -> None:
    a, b = {"host": "a", "cpu": "x"}, {"host": "b", "cpu": "y"}
    assert together([a, a, b, b]) == [a | {"ranks": [0, 1]}, b | {"ranks": [2, 3]}]


def test_a_launcher_is_told_with_those_above_it_a_shell_is_not() -> None:
    inner = [sys.executable, "-c", "import sys; print(flush=True); sys.stdin.read()", "torch.distributed.run"]
    outer = f"import os, subprocess, sys; p = subprocess.Popen({inner!r}); print(p.pid, flush=True); p.wait()"
    with subprocess.Popen(
        [sys.executable, "-c", outer, "/bin/regraft", "train"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline() or 0)
        assert process.stdout.readline() == "\n"
        assert launchers(pid) == [inner, process.args], "and not pytest"
        assert launchers(os.getpid()) == []
        process.communicate()


def test_gpus_and_driver_are_read_from_the_kernels_files(tmp_path: Path) -> None:
    (tmp_path / "driver/nvidia/gpus/0000:01:00.0").mkdir(parents=True)
    (tmp_path / "driver/nvidia/gpus/0000:01:00.0/information").write_text(
        "Model: \t\t NVIDIA H100 80GB HBM3\nIRQ: 1\n"
    )
    (tmp_path / "driver/nvidia/version").write_text(
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  570.86.15  Thu Jan 1\nGCC version:  gcc 12\n"
    )
    found = hardware.hardware(torch.device("cpu"), proc=tmp_path)
    assert found["gpus"] == [{"name": "NVIDIA H100 80GB HBM3"}]
    assert found["driver"] == "570.86.15"
    assert (found["cpu"], found["memory"]) == (None, None)


def test_several_processes_are_gathered_and_rank_0_writes(
    attempt: RunLock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gathered = [{"host": "a"}, {"host": "b"}]
    monkeypatch.setattr(environment, "gather_object", lambda _: gathered)
    ctx: Any = SimpleNamespace(world_size=2, accelerator=SimpleNamespace(device=torch.device("cpu")))
    assert keep(attempt.folder, None, ctx) is None
    assert not (attempt.folder / ENVIRONMENT).exists(), "another rank's"
    keep(attempt.folder, attempt, ctx)
    assert read(attempt)["hosts"] == [{"host": "a", "ranks": [0]}, {"host": "b", "ranks": [1]}]


def test_a_run_writes_its_environment_at_each_start_and_does_without_if_need_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 2, "b": 2}, "test": {"a": 1, "b": 1}})
    config = Config(
        run=RunConfig(dir=str(tmp_path / "run"), device="cpu", threads=1),
        data=DataConfig(root=str(root), image_size=32, num_workers=0, cache=str(tmp_path / "cache")),
        model=ModelConfig(name="squeezenet1_1", weights=None),
        train=TrainConfig(epochs=1, batch_size=4),
    )
    threads = torch.get_num_threads()
    with StopSignals() as signals:
        run(config, signals)
        monkeypatch.setattr(environment, "packages", lambda: 1 / 0)
        capsys.readouterr()
        run(replace(config, train=TrainConfig(epochs=2, batch_size=4)), signals)
    torch.set_num_threads(threads)
    assert "could not be written down: ZeroDivisionError" in capsys.readouterr().out
    assert [one.state for one in read_attempts(tmp_path / "run")] == ["done", "done"]
    assert (tmp_path / "run" / ENVIRONMENT / "0001.json").exists()
