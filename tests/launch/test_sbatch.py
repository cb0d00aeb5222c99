import os
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.errors import LaunchError
from launch.slurm.sbatch import JobSpec, render
from launch.slurm.settings import OPTION_NAMES, JobSettings
from launch.slurm.site import Site
from tests.conftest import REPOSITORY
from tests.launch.helpers import executable

GOLDEN = REPOSITORY / "tests" / "golden"
UPDATE = "REGRAFT_GOLDEN"
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
SPECS = {  # the default job and an array over seeds are in slurm/
    "eight-gpus": JobSpec(
        job_name="fine tune", gpus_per_node=8, cpus_per_task=64, mem="256G", time="2-00:00:00", signal_seconds=300
    ),
    "two-nodes": JobSpec(
        **{"nodes": 2, "gpus_per_node": 8, "cpus_per_task": 64, "partition": "h100", "account": "team", "qos": "high"},
        settings=JobSettings(max_attempts=5, max_restarts=3),
        options=("--config", "configs/hotdog.yaml", "--run.dir=runs/a b"),
    ),
    "array-of-lines": JobSpec(array="0-9%2", settings=JobSettings(sweep="my sweep.txt"), options=("--data.root", "x")),
    "site": JobSpec(nodes=2, gpus_per_node=4, partition="debug", site=SITE, settings=JobSettings(stage="$TMPDIR")),
    "site-with-venv": JobSpec(site=Site(activate=("/opt/regraft's venv/",))),
    "apptainer": JobSpec(
        gpus_per_node=1, settings=JobSettings(container="/images/regraft.sif", mounts=("/scratch/u",))
    ),
    "pyxis": JobSpec(
        nodes=2,
        gpus_per_node=8,
        settings=JobSettings(container="nvcr.io#nvidia/pytorch:26.01-py3", container_runtime="pyxis"),
    ),
}


@pytest.mark.parametrize("name", SPECS)
def test_script_equals_its_golden_file(name: str) -> None:
    path, script = GOLDEN / f"{name}.sh", render(SPECS[name])
    if os.environ.get(UPDATE):
        path.write_text(script, encoding="utf-8")
    hint = f"if this is intended, {UPDATE}=1 pytest tests/launch/test_sbatch.py updates it: check the diff"
    assert script == path.read_text(encoding="utf-8"), hint


@pytest.mark.parametrize(("name", "argv"), [("finetune", []), ("array", ["--sweep", "seeds", "--array", "0-2"])])
def test_scripts_in_slurm_folder_are_the_output_of_render(
    name: str, argv: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))  # without a site.yaml
    for variable in ("REGRAFT_SITE", "REGRAFT_NPROC", "REGRAFT_MAX_RESTARTS", "REGRAFT_MAX_ATTEMPTS"):
        monkeypatch.delenv(variable, raising=False)
    assert cli.main(["render", *argv]) == 0
    path = REPOSITORY / "slurm" / f"{name}.sh"
    hint = f"if this is intended: regraft render {' '.join(argv)} > slurm/{name}.sh"
    assert capsys.readouterr().out == path.read_text(encoding="utf-8"), hint


SCRIPTS = sorted([*GOLDEN.glob("*.sh"), *(REPOSITORY / "slurm").glob("*.sh")])


def test_bash_and_shellcheck_accept_the_scripts() -> None:
    assert len(SCRIPTS) == len(SPECS) + 2
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True, timeout=60)
        # The golden files quote `$HOME` and the like on purpose (SC2016, an info).
        severity = "style" if path.parent.name == "slurm" else "warning"
        command = ["shellcheck", f"--severity={severity}", path]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, done.stdout


HOSTILE = [
    *("a b", 'it\'s "so"', "$(touch pwned)", "`touch pwned`", "a; touch pwned", "x\ntouch pwned\n#SBATCH --nodes=9"),
    *("%j%x", "a\\", "# no comment", "-n", "*", "~", "é", "\udcff"),
]
"""Names that bash or sbatch would interpret if they were not quoted."""


def run_script(script: str, folder: Path) -> list[str]:
    """Run a script with a python3 that only writes its arguments to a file, and return them."""
    arguments = folder / "arguments"
    executable(folder / "python3", f'printf "%s\\0" "$@" > {shlex.quote(str(arguments))}')
    environment = {"PATH": f"{folder}:/usr/bin:/bin", "HOME": str(folder)}
    subprocess.run(["bash", "-s"], input=os.fsencode(script), cwd=folder, env=environment, check=True, timeout=60)
    assert not (folder / "pwned").exists()
    return os.fsdecode(arguments.read_bytes()).split("\0")[:-1]


@pytest.mark.parametrize("name", HOSTILE)
def test_options_and_site_settings_are_not_interpreted(name: str, tmp_path: Path) -> None:
    options, value = ("--run.dir", name, f"--data.root={name}"), name if name.isprintable() else "a site has no such"
    site = Site(env=(("A", value),), activate=(f"true {shlex.quote(value)}",), nccl_interface=value)
    print_values = 'printf "%s\\0" "$A" "$NCCL_SOCKET_IFNAME" > values'
    script = render(JobSpec(options=options, site=site)).replace("exec python3", f"{print_values}; exec python3")
    assert run_script(script, tmp_path) == ["-m", "launch.slurm.job", *options]
    assert (tmp_path / "values").read_text(encoding="utf-8") == f"{value}\0{value}\0"


def test_names_are_quoted_by_the_rules_of_sbatch() -> None:
    # See _get_argument in Slurm's sbatch/opt.c; tests/slurm/test_submit.py asks a real sbatch.
    for name, option in (
        ("a b", '"--partition=a b"'),
        ('it\'s "so"', '"--partition=it\'s \\"so\\""'),
        ("a\\", '"--partition=a\\\\"'),
        ("# no", '"--partition=# no"'),
        ("%j%x", "--partition=%j%x"),
    ):
        assert f"#SBATCH {option}" in render(JobSpec(partition=name)).splitlines()


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (JobSpec, {"job_name": "x\n#SBATCH --nodes=9"}, "--job-name"),
        (JobSpec, {"job_name": "../x"}, "without slashes"),
        (JobSpec, {"job_name": " "}, "--job-name"),
        (JobSpec, {"partition": "a\nb"}, "--partition"),
        (JobSpec, {"account": "a\x1bb"}, "--account"),
        (JobSpec, {"nodes": 0}, "--nodes 0"),
        (JobSpec, {"gpus_per_node": 0}, "--gpus-per-node 0"),
        (JobSpec, {"time": "4h"}, "--time '4h'"),
        (JobSpec, {"time": "1\n"}, "--time"),
        (JobSpec, {"time": "١"}, "--time"),
        (JobSpec, {"mem": "64 G"}, "--mem"),
        (JobSpec, {"array": "0-"}, "--array"),
        (JobSpec, {"array": "1;touch pwned"}, "--array"),
        (JobSpec, {"signal_seconds": 5}, "--signal-seconds 5"),
        (JobSpec, {"settings": JobSettings(sweep="seeds")}, "add --array"),
        (JobSettings, {"nproc": 0}, "--nproc 0"),
        (JobSettings, {"max_attempts": 0}, "--max-attempts 0"),
        (JobSettings, {"container": "-x"}, "--container"),
        (JobSettings, {"container": "a\nb"}, "--container"),
        (JobSettings, {"container_runtime": "docker"}, "apptainer or pyxis"),
        (JobSettings, {"mounts": ("relative",)}, "--mount"),
        (JobSettings, {"mounts": ("/a:/b",)}, "--mount"),
        (JobSettings, {"sweep": ""}, "--sweep"),
    ],
)
def test_invalid_job_is_refused(kind: type, changes: dict[str, object], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        kind(**changes)


def test_settings_argv_has_all_option_names_but_no_defaults() -> None:
    counts: dict[str, Any] = {"nproc": 2, "max_restarts": 0, "max_attempts": 7}
    container: dict[str, Any] = {"container": "c", "container_runtime": "pyxis", "mounts": ("/a", "/b")}
    settings = JobSettings(sweep="s", stage="/t", **counts, **container)
    assert {argument.partition("=")[0] for argument in settings.to_argv()} == set(OPTION_NAMES)
    assert JobSettings().to_argv() == []
