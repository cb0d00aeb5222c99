import os
import shlex
import shutil
import stat
from pathlib import Path

import pytest

from launch import cli
from launch.slurm import submit
from launch.slurm.sbatch import Spec, render
from launch.slurm.settings import NAMES
from tests.folders import image_folder


@pytest.fixture
def login(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a login node's folder, with an sbatch that only writes down what it was given."""
    programs = tmp_path / "bin"
    programs.mkdir()
    sbatch = programs / "sbatch"
    sbatch.write_text(
        f'#!/bin/sh\nprintf "%s\\0" "$@" > {tmp_path}/words\nenv > {tmp_path}/environment\necho "42;cluster"\n'
    )
    sbatch.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REGRAFT_SITE", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(login: Path) -> list[str]:
    return (login / "words").read_text().split("\0")[:-1]


def test_a_submitted_job_is_what_render_prints_and_its_folder_is_there(
    login: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = login / "run's $(touch pwned) 100%"
    code = cli.main(
        ["submit", "--no-fetch", "--nodes", "2", "--job-name", "a b", f"--run.dir={run}", "--optim.lr", "1"]
    )
    assert code == 0
    assert words_of(login) == [
        "--parsable",
        f"--output={run}/logs/slurm-%j.out".replace("100%", "100%%"),
        str(run / "job.sh"),
    ]
    assert (run / "logs").is_dir()
    spec = Spec(nodes=2, job_name="a b", options=(f"--run.dir={run}", "--optim.lr", "1", f"--run.dir={run}"))
    assert (run / "job.sh").read_text() == render(spec)
    said = capsys.readouterr().out
    assert "job 42 submitted" in said
    assert f"regraft status {shlex.quote(str(run))} --watch" in said
    assert not (login / "pwned").exists()


def test_a_job_that_names_no_folder_gets_one_of_its_own(login: Path) -> None:
    assert cli.main(["submit", "--no-fetch", "--job-name", "my job", "--data.root", "x"]) == 0
    (run,) = (login / "runs").iterdir()
    assert run.name.startswith("my_job-")
    assert f"--run.dir={run}" in shlex.split((run / "job.sh").read_text(), comments=True)


def test_a_sweep_is_kept_as_it_was_submitted(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (login / "sweep").write_text("--optim.lr 1\n--optim.lr 2\n")
    assert cli.main(["submit", "--no-fetch", "--sweep", "sweep", "--run.dir=runs/s", "--data.root=x"]) == 0
    run = login / "runs" / "s"
    assert (run / "sweep.txt").read_text() == (login / "sweep").read_text()
    script = (run / "job.sh").read_text()
    assert "#SBATCH --array=0-1\n" in script
    assert f"--sweep={run}/sweep.txt" in script
    assert words_of(login)[1].endswith("slurm-%A_%a.out")
    assert f"regraft status {run}/0 --watch" in capsys.readouterr().out
    # Once more, from the copy.
    assert cli.main(["submit", "--no-fetch", f"--sweep={run}/sweep.txt", f"--run.dir={run}"]) == 0
    assert (run / "sweep.txt").read_text() == (login / "sweep").read_text()


def test_what_was_asked_for_goes_before_sbatchs_variables(
    login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SBATCH_PARTITION", "slow")
    monkeypatch.setenv("SBATCH_ACCOUNT", "team")
    assert cli.main(["submit", "--no-fetch", "--partition", "fast", "--run.dir=r"]) == 0
    seen = (login / "environment").read_text()
    assert "SBATCH_PARTITION" not in seen
    assert "SBATCH_ACCOUNT=team" in seen


def test_a_job_that_slurm_refuses_leaves_no_folder(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (login / "bin" / "sbatch").write_text("#!/bin/sh\necho sbatch: error: no such partition >&2\nexit 1\n")
    assert cli.main(["submit", "--no-fetch", "--run.dir=r"]) == 2
    assert "Slurm refused the job: sbatch: error: no such partition" in capsys.readouterr().err
    assert not (login / "r").exists()


def test_without_slurm_it_says_where_to_submit_from(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (login / "bin" / "sbatch").unlink()
    if shutil.which("sbatch"):
        for name in ("bash", "sh"):
            (login / "bin" / name).symlink_to(str(shutil.which(name)))
        os.environ["PATH"] = str(login / "bin")  # the fixture puts it back
    assert cli.main(["submit", "--no-fetch", "--run.dir=r"]) == 2
    assert "from a login node" in capsys.readouterr().err


def test_the_job_runs_in_the_python_that_submitted_it(login: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VIRTUAL_ENV", raising=False)  # .venv/bin/regraft, with nothing activated
    monkeypatch.setattr(submit.sys, "prefix", "/home/u/venv")
    assert cli.main(["submit", "--no-fetch", "--run.dir=r"]) == 0
    assert "VIRTUAL_ENV=/home/u/venv\n" in (login / "environment").read_text()


@pytest.mark.parametrize("code", [2, 1])
def test_what_the_trainer_refuses_is_not_submitted(
    code: int, login: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[list[str]] = []

    def refuse(runs: list[list[str]]) -> int:
        asked.extend(runs)
        return code

    monkeypatch.setattr(submit, "_fetch", refuse)
    assert cli.main(["submit", "--nodes=2", "--optim.lrr", "1", "--run.dir=r"]) == code
    assert asked == [["--optim.lrr", "1", "--run.dir=r"]]
    assert not (login / "words").exists()
    assert not (login / "r").exists()


@pytest.mark.slow
def test_submitting_checks_the_options_and_finds_the_data(
    login: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    image_folder(login / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1, "b": 1}}, seed=1)
    options = ["--data.root=data", "--model.weights=null", "--data.image_size=32", "--run.dir=r"]
    assert cli.main(["submit", *options, "--optim.lrr=1"]) == 2
    assert "Did you mean optim.lr?" in capfd.readouterr().err
    assert not (login / "words").exists()
    assert cli.main(["submit", *options]) == 0
    assert "4 images to train on" in capfd.readouterr().out
    assert (login / "words").exists()


@pytest.mark.parametrize("verb", ["submit", "render"])
def test_each_verb_explains_itself(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main([verb, "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    assert all(name in said for name in (*NAMES, "--gpus-per-node", "--site", "--array"))


def test_render_submits_nothing(login: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["render", "--gpus-per-node", "4", "--run.dir", "a b"]) == 0
    expected = Spec(gpus_per_node=4, options=("--run.dir", "a b"))
    assert capsys.readouterr().out == render(expected)
    assert not (login / "words").exists()
    assert not (login / "a b").exists()
