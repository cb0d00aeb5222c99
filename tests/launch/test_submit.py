import os
import shlex
import shutil
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from launch import cli
from launch.slurm import submit
from launch.slurm.sbatch import JobSpec, render
from regraft.contract import JOB_ID
from tests.folders import image_folder
from tests.launch.helpers import executable


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the working folder on a login node, whose sbatch only writes down its arguments and environment."""
    script = f'printf "%s\\0" "$@" > {tmp_path}/argv\nenv > {tmp_path}/environment\necho "42;cluster"'
    executable(tmp_path / "bin" / "sbatch", script)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REGRAFT_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def submitted(login: Path) -> list[str]:
    """Return the arguments of sbatch."""
    return (login / "argv").read_text().split("\0")[:-1]


def test_submit_writes_the_script_of_render_and_makes_the_run_folder(
    login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = login / "run's $(touch pwned) 100%"
    argv = ["--nodes", "2", "--job-name", "a b", f"--run.dir={run}", "--optim.lr", "1"]
    assert cli.main(["submit", "--no-fetch", *argv]) == 0
    output = f"--output={run}/logs/slurm-%j.out".replace("100%", "100%%")
    assert submitted(login) == ["--parsable", output, str(run / "job.sh")]
    assert (run / "logs").is_dir()
    spec = JobSpec(nodes=2, job_name="a b", options=(*argv[4:], f"--run.dir={run}"))
    assert (run / "job.sh").read_text() == render(spec)
    printed = capsys.readouterr().out
    assert "job 42 submitted" in printed
    assert f"regraft status {shlex.quote(str(run))} --watch" in printed
    assert not (login / "pwned").exists()
    (login / "argv").unlink()
    assert cli.main(["render", *argv[:-2], "--run.dir", "a b"]) == 0
    assert capsys.readouterr().out == render(replace(spec, options=(f"--run.dir={run}", "--run.dir", "a b")))
    assert not (login / "argv").exists(), "render submits nothing"
    assert not (login / "a b").exists()


def test_interrupted_submission_leaves_no_folder_and_says_when_slurm_may_have_the_job(
    login: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    after_stop = {"_check_script": "nothing was submitted. Run the same command again"}
    after_stop["_submit"] = "`squeue --me` shows whether the job was submitted"
    after_stop["_print_job"] = "job 42 was submitted"
    for function, message in after_stop.items():
        original = getattr(submit, function)
        monkeypatch.setattr(submit, function, interrupt)
        assert cli.main(["submit", "--no-fetch", "--run.dir=run"]) == 75
        assert capsys.readouterr().err == f"stopped by SIGTERM: {message}\n"
        assert (login / "run").exists() == (function != "_check_script"), "a job writes its output there"
        shutil.rmtree(login / "run", ignore_errors=True)
        monkeypatch.setattr(submit, function, original)


def test_failed_write_of_the_job_id_does_not_hide_the_job(
    login: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text, raised = Path.write_text, list[BaseException]()

    def fail(path: Path, *arguments: str, **options: str) -> int:
        if path.name == JOB_ID:
            raise raised[-1]
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail)
    for error, code, message in (
        (OSError(28, "No space left on device"), 2, "error: job 42 was submitted, but "),
        (KeyboardInterrupt("SIGINT"), 75, "stopped by SIGINT: job 42 was submitted"),
    ):
        raised.append(error)
        assert cli.main(["submit", "--no-fetch", "--run.dir=run"]) == code
        assert capsys.readouterr().err.startswith(message)
        assert (login / "run" / "job.sh").exists()
        shutil.rmtree(login / "run")


def test_sweep_file_is_copied_to_the_run_folder(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (login / "sweep").write_text("--optim.lr 1\n--optim.lr 2\n")
    assert cli.main(["submit", "--no-fetch", "--sweep", "sweep", "--run.dir=runs/s", "--data.root=x"]) == 0
    run = login / "runs" / "s"
    assert (run / "sweep.txt").read_text() == (login / "sweep").read_text()
    script = (run / "job.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert f"--sweep={run}/sweep.txt" in script
    assert submitted(login)[1].endswith("slurm-%A_%a.out")
    assert f"regraft status {run}/0 --watch" in capsys.readouterr().out
    # Submit the copy itself.
    assert cli.main(["submit", "--no-fetch", f"--sweep={run}/sweep.txt", f"--run.dir={run}"]) == 0
    assert (run / "sweep.txt").read_text() == (login / "sweep").read_text()


def test_options_override_the_variables_of_sbatch(login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "slow")
    monkeypatch.setenv("SBATCH_ACCOUNT", "team")
    # A virtual environment whose regraft is called by path, without activation.
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)
    monkeypatch.setattr(submit.sys, "prefix", "/home/u/venv")
    assert cli.main(["submit", "--no-fetch", "--partition", "fast", "--job-name", "my job", "--data.root", "x"]) == 0
    (run,) = (login / "runs").iterdir()
    assert run.name.startswith("my_job-"), "the default run folder is named after the job"
    assert f"--run.dir={run}" in shlex.split((run / "job.sh").read_text(), comments=True)
    environment = (login / "environment").read_text().splitlines()
    assert not [line for line in environment if line.startswith("SBATCH_PARTITION")]
    assert {"SBATCH_ACCOUNT=team", "VIRTUAL_ENV=/home/u/venv"} <= set(environment)


def test_refused_job_leaves_no_folder_and_without_slurm_the_login_node_is_named(
    login: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    executable(login / "bin" / "sbatch", "echo sbatch: error: no such partition >&2\nexit 1")
    assert cli.main(["submit", "--no-fetch", "--run.dir=r"]) == 2
    assert "Slurm refused the job: sbatch: error: no such partition" in capsys.readouterr().err
    assert not (login / "r").exists()
    (login / "bin" / "sbatch").unlink()
    for name in ("bash", "sh"):
        (login / "bin" / name).symlink_to(str(shutil.which(name)))
    monkeypatch.setenv("PATH", str(login / "bin"))
    assert cli.main(["submit", "--no-fetch", "--run.dir=r"]) == 2
    assert "from a login node" in capsys.readouterr().err


@pytest.mark.slow
def test_submit_checks_the_options_and_finds_the_data(login: Path, capfd: pytest.CaptureFixture[str]) -> None:
    image_folder(login / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}}, seed=1)
    options = ["--data.root=data", "--model.weights=null", "--data.image_size=32", "--run.dir=r"]
    assert cli.main(["submit", *options, "--optim.lrr=1"]) == 2
    assert "Did you mean --optim.lr 1?" in capfd.readouterr().err
    assert not (login / "argv").exists()
    assert not (login / "r").exists()
    assert cli.main(["submit", *options]) == 0
    assert "4 images to train on" in capfd.readouterr().out
    assert (login / "argv").exists()
