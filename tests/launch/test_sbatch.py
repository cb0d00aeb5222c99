import os
import shlex
import shutil
import stat
import subprocess
from pathlib import Path

import pytest

from launch import cli
from launch.errors import LaunchError
from launch.slurm.sbatch import Spec, render
from launch.slurm.settings import NAMES, Settings
from launch.slurm.site import Site
from tests.conftest import REPOSITORY

GOLDEN = REPOSITORY / "tests" / "golden"
ANEW = "REGRAFT_GOLDEN"
SITE = Site(
    partition="gpu",
    account="team",
    qos="normal",
    modules=("cuda/12.8", "gcc"),
    activate=("source ~/miniforge3/etc/profile.d/conda.sh", "conda activate regraft"),
    nccl_interface="ib0",
    stage="$TMPDIR",
    env=(("NCCL_DEBUG", "WARN"), ("NOTE", "it's $HOME")),
)
SPECS = {
    "default": Spec(),
    "single-gpu": Spec(
        gpus_per_node=1, cpus_per_task=8, time="1:00:00", options=("--config", "configs/hotdog.yaml")
    ),
    "eight-gpus": Spec(
        job_name="fine tune",
        gpus_per_node=8,
        cpus_per_task=64,
        mem="256G",
        time="2-00:00:00",
        signal_seconds=300,
    ),
    "two-nodes": Spec(
        nodes=2,
        gpus_per_node=8,
        cpus_per_task=64,
        partition="h100",
        account="team",
        qos="high",
        settings=Settings(max_attempts=5, max_restarts=3),
        options=("--config", "configs/hotdog.yaml", "--run.dir=runs/a b"),
    ),
    "cpu": Spec(cpus_per_task=32, settings=Settings(nproc=4), options=("--run.device=cpu",)),
    "array": Spec(array="0-2", settings=Settings(sweep="seeds")),
    "array-of-lines": Spec(
        array="0-9%2", settings=Settings(sweep="my sweep.txt"), options=("--data.root", "x")
    ),
    "site": Spec(nodes=2, gpus_per_node=4, partition="debug", site=SITE, settings=Settings(stage="$TMPDIR")),
    "site-with-venv": Spec(site=Site(activate=("/opt/regraft's venv/",))),
    "apptainer": Spec(
        gpus_per_node=1, settings=Settings(container="/images/regraft.sif", mounts=("/scratch/u",))
    ),
    "pyxis": Spec(
        nodes=2,
        gpus_per_node=8,
        settings=Settings(container="nvcr.io#nvidia/pytorch:26.01-py3", container_runtime="pyxis"),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_a_script_is_what_it_was(name: str) -> None:
    path, text = GOLDEN / f"{name}.sh", render(SPECS[name])
    if os.environ.get(ANEW):
        path.write_text(text, encoding="utf-8")
    hint = f"if it is meant, {ANEW}=1 pytest tests/launch/test_slurm.py writes it anew: read its diff"
    assert path.exists(), f"{path} is missing; {hint}"
    assert text == path.read_text(encoding="utf-8"), hint


def test_there_is_no_golden_file_too_many() -> None:
    assert sorted(path.name for path in GOLDEN.iterdir()) == sorted(f"{name}.sh" for name in SPECS)


@pytest.mark.parametrize(
    ("name", "words"), [("finetune", []), ("array", ["--sweep", "seeds", "--array", "0-2"])]
)
def test_the_templates_are_what_render_prints(
    name: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # where the user's own site.yaml may lie
    for variable in ("REGRAFT_SITE", "REGRAFT_NPROC", "REGRAFT_MAX_RESTARTS", "REGRAFT_MAX_ATTEMPTS"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["render", *words]) == 0
    path = REPOSITORY / "slurm" / f"{name}.sh"
    again = f"if it is meant: regraft render {' '.join(words)} > slurm/{name}.sh"
    assert capsys.readouterr().out == path.read_text(encoding="utf-8"), again


SCRIPTS = sorted([*GOLDEN.glob("*.sh"), *(REPOSITORY / "slurm").glob("*.sh")])


def test_bash_and_shellcheck_have_nothing_to_say() -> None:
    assert len(SCRIPTS) == len(SPECS) + 2
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True, timeout=60)
    for path in SCRIPTS:
        # What is quoted for a user is meant to be no more than it says (SC2016, an info).
        least = "style" if path.parent.name == "slurm" else "warning"
        done = subprocess.run(
            ["shellcheck", f"--severity={least}", path],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stdout


# Names that mean to be more than names.

HOSTILE = [
    "a b",
    'it\'s "so"',
    "$(touch pwned)",
    "`touch pwned`",
    "a; touch pwned",
    "x\ntouch pwned\n#SBATCH --nodes=9",
    "%j%x",
    "a\\",
    "# no comment",
    "-n",
    "*",
    "~",
    "é",
    "\udcff",
]


def run_script(text: str, folder: Path) -> list[str]:
    """Run a script with a python3 that only writes down its arguments; returns them."""
    python = folder / "python3"
    python.write_text(f'#!/bin/sh\nprintf "%s\\0" "$@" > {shlex.quote(str(folder / "words"))}\n')
    python.chmod(stat.S_IRWXU)
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    script = os.fsencode(text)
    done = subprocess.run(
        ["bash", "-s"],
        input=script,
        cwd=folder,
        env=environment,
        capture_output=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return os.fsdecode((folder / "words").read_bytes()).split("\0")[:-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_an_option_reaches_the_trainer_as_it_was_given(name: str, tmp_path: Path) -> None:
    spec = Spec(options=("--run.dir", name, f"--data.root={name}"))
    assert run_script(render(spec), tmp_path) == [
        "-m",
        "launch.slurm.job",
        "--run.dir",
        name,
        f"--data.root={name}",
    ]
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.isprintable()])
def test_what_a_site_says_is_no_more_than_words(name: str, tmp_path: Path) -> None:
    site = Site(env=(("A", name),), activate=(f"true {shlex.quote(name)}",), nccl_interface=name)
    text = render(Spec(site=site)).replace(
        "exec python3", 'printf "%s\\0" "$A" "$NCCL_SOCKET_IFNAME" > said; exec python3'
    )
    run_script(text, tmp_path)
    assert (tmp_path / "said").read_text(encoding="utf-8") == f"{name}\0{name}\0"
    assert not (tmp_path / "pwned").exists()


def sbatch_reads(line: str) -> list[str]:
    """Return the words of an #SBATCH line by the rules of Slurm's own reader (sbatch/opt.c, _get_argument)."""
    words, word, quote, escaped, begun = [], "", "", False, False
    for character in line.removeprefix("#SBATCH"):
        if escaped:
            word, escaped, begun = word + character, False, True
        elif character == "\\":
            escaped = True
        elif quote:
            word, quote = (word, "") if character == quote else (word + character, quote)
        elif character in "\"'":
            quote, begun = character, True
        elif character == "#":
            break
        elif character.isspace():
            if begun:
                words.append(word)
            word, begun = "", False
        else:
            word, begun = word + character, True
    assert not quote, line
    assert not escaped, line
    return [*words, word] if begun else words


@pytest.mark.parametrize("name", [name for name in HOSTILE if name.isprintable()])
def test_a_name_is_one_word_of_the_header(name: str) -> None:
    spec = Spec(job_name=name.replace("\\", "|"), partition=name, account=name, qos=name)
    lines = [line for line in render(spec).splitlines() if line.startswith("#SBATCH")]
    found = [sbatch_reads(line) for line in lines]
    assert all(len(words) == 1 for words in found)
    assert {f"--job-name={spec.job_name}", f"--partition={name}", f"--account={name}", f"--qos={name}"} <= {
        words[0] for words in found
    }


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"job_name": "x\n#SBATCH --nodes=9"}, "--job-name"),
        ({"job_name": "../x"}, "without slashes"),
        ({"job_name": " "}, "--job-name"),
        ({"partition": "a\nb"}, "--partition"),
        ({"account": "a\x1bb"}, "--account"),
        ({"nodes": 0}, "--nodes 0"),
        ({"gpus_per_node": 0}, "--gpus-per-node 0"),
        ({"time": "4h"}, "--time '4h'"),
        ({"time": "1\n"}, "--time"),
        ({"time": "١"}, "--time"),
        ({"mem": "64 G"}, "--mem"),
        ({"array": "0-"}, "--array"),
        ({"array": "1;touch pwned"}, "--array"),
        ({"signal_seconds": 5}, "--signal-seconds 5"),
        ({"settings": Settings(sweep="seeds")}, "add --array"),
    ],
)
def test_an_impossible_job_is_refused_by_name(changes: dict[str, object], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        Spec(**changes)  # type: ignore[arg-type]


def test_the_trainer_gets_the_time_ahead_of_the_limit_but_for_a_margin() -> None:
    assert "@300\n" in render(Spec(signal_seconds=300))
    assert "TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-280}" in render(Spec(signal_seconds=300))


def test_the_settings_words_are_the_jobs_own() -> None:
    every = Settings(
        nproc=2,
        max_restarts=0,
        max_attempts=7,
        sweep="s",
        stage="/t",
        container="c",
        container_runtime="pyxis",
        mounts=("/a", "/b"),
    )
    assert {word.partition("=")[0] for word in every.words()} == set(NAMES)
    assert Settings().words() == []
