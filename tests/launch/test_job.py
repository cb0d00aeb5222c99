import os
import socket
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm import job
from launch.slurm.allocation import Allocation, choose_port, is_port_free, read_allocation, resolve_node_addresses
from launch.slurm.container import apptainer_argv, mounted_folders, pyxis_options
from launch.slurm.job import resolve_run_dir, step_environment
from launch.slurm.node import node_logs
from launch.slurm.settings import JobSettings, task_options
from regraft.startup_signals import STOP_SIGNALS
from tests.launch.helpers import executable, restored_handlers, write_failure
from tests.launching import free_port

JOB = Allocation(
    job_id="123", array_id=None, task=None, name="regraft", nodes="node[1-2]", restarts=0, cpus_per_task="4"
)
TASK = replace(JOB, job_id="130", array_id="123", task=7)
WORKDIR = Path("/home/u/my project")


@pytest.mark.parametrize(
    ("options", "allocation", "expected"),
    [
        (["--data.root=x"], JOB, WORKDIR / "runs/regraft-123"),
        ([], JOB, WORKDIR / "runs/regraft-123"),  # not the quickstart's, which jobs would share
        (["--run.dir", "runs/a b"], JOB, WORKDIR / "runs/a b"),
        (["--run.dir=/scratch/$(touch x)"], JOB, Path("/scratch/$(touch x)")),
        (["--data.root=x"], TASK, WORKDIR / "runs/regraft-123_7"),
        (["--run.dir=runs/a"], TASK, WORKDIR / "runs/a/7"),
        (["--data.root=x"], replace(JOB, name="../$(touch x) a"), WORKDIR / "runs/..___touch_x__a-123"),
    ],
)
def test_run_folder_is_the_same_for_all_starts(options: list[str], allocation: Allocation, expected: Path) -> None:
    folder, argv = resolve_run_dir(options, JobSettings(), allocation, WORKDIR)
    assert (folder, argv) == (expected, (*options, f"--run.dir={expected}"))
    assert resolve_run_dir(options, JobSettings(), replace(allocation, restarts=3), WORKDIR)[0] == folder


def test_run_options_of_a_config_file(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run:\n  dir: runs/from config\n  resume: never\n")
    options = ["--config", str(config)]
    folder, argv = resolve_run_dir(options, JobSettings(), JOB, WORKDIR)
    assert folder == WORKDIR / "runs/from config"
    assert "--run.resume=auto" not in argv, "the first start does not resume"
    assert resolve_run_dir(options, JobSettings(), replace(JOB, restarts=1), WORKDIR)[1][-1] == "--run.resume=auto"


def test_sweep_over_seeds_or_over_the_lines_of_a_file(tmp_path: Path) -> None:
    _, argv = resolve_run_dir(["--data.root=x"], JobSettings(sweep="seeds"), TASK, WORKDIR)
    assert argv[:2] == ("--data.root=x", "--run.seed=7")
    file = tmp_path / "sweep.txt"
    file.write_text("# learning rates\n--optim.lr 0.1\n\n--optim.lr 0.01 --run.dir '/s/a b'\n")
    options, settings = ["--run.dir=runs/a"], JobSettings(sweep=str(file))
    first, argv = resolve_run_dir(options, settings, replace(TASK, task=0), WORKDIR)
    assert argv == ("--run.dir=runs/a", "--optim.lr", "0.1", f"--run.dir={WORKDIR}/runs/a/0")
    assert first == WORKDIR / "runs/a/0"
    assert resolve_run_dir(options, settings, replace(TASK, task=1), WORKDIR)[0] == Path("/s/a b")
    with pytest.raises(LaunchError, match="has 2 lines of options, none for task 2; expected --array=0-1"):
        task_options(str(file), 2)
    with pytest.raises(LaunchError, match="cannot be read"):
        task_options(str(tmp_path / "missing"), 0)
    for text, message in (("--run.dir 'a\n", "line 1: No closing quotation"), ("# none\n", "has no options")):
        file.write_text(text)
        with pytest.raises(LaunchError, match=message):
            task_options(str(file), 0)


JOB_VARIABLES = {"SLURM_JOB_ID": "130", "SLURM_JOB_NODELIST": "node[1-2]", "SLURM_JOB_NAME": "regraft"}
ENVIRONMENT = {**JOB_VARIABLES, "SLURM_CPUS_PER_TASK": "4"}


def test_allocation_is_read_from_the_environment() -> None:
    assert read_allocation(ENVIRONMENT) == replace(JOB, job_id="130")
    array = {"SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2"}
    allocation = read_allocation({**ENVIRONMENT, **array})
    assert allocation == replace(TASK, restarts=2)
    assert step_environment(allocation, {"A": "b"}) == {"A": "b", "SRUN_CPUS_PER_TASK": "4"}
    assert step_environment(replace(JOB, cpus_per_task=None), {"A": "b"}) == {"A": "b"}
    # The job id of the last task is the array's id, which means all tasks.
    assert (allocation.label, allocation.rdzv_id) == ("123_7", "130.2")
    for missing in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST"):
        with pytest.raises(LaunchError, match=r"sbatch slurm/finetune\.sh"):
            read_allocation({**ENVIRONMENT, missing: ""})


SCONTROL_OUTPUT = (
    "NodeName=node2 Arch=x86_64 NodeAddr=10.0.0.2 NodeHostName=vm Version=22.05\n"
    "NodeName=node1 Arch=x86_64 NodeAddr=gpu1-ib NodeHostName=gpu1 Version=22.05\n"
)


def test_node_address_is_the_first_that_resolves() -> None:
    for names, unresolvable, expected in (
        (["node1", "node2"], "none", ("gpu1-ib", "10.0.0.2")),
        (["node1", "node2"], "gpu1-ib", ("gpu1", "10.0.0.2")),
        (["node9"], "none", ("node9",)),
    ):
        assert resolve_node_addresses(names, SCONTROL_OUTPUT, lambda name, no=unresolvable: name != no) == expected
    with pytest.raises(LaunchError, match="node node1: none of gpu1-ib, gpu1, node1 can be resolved"):
        resolve_node_addresses(["node1"], SCONTROL_OUTPUT, lambda _: False)


def test_port_is_free_and_below_those_that_the_system_chooses() -> None:
    for job_id in ("1", "9999", "10000", "4294901757"):
        port = choose_port(job_id, lambda _: True)
        following = choose_port(job_id, lambda candidate, port=port: candidate != port)  # type: ignore[misc]
        assert port != following
        assert {20_000 <= candidate < 32_768 for candidate in (port, following)} == {True}
    with pytest.raises(LaunchError, match="no port"):
        choose_port("1", lambda _: False)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        assert not is_port_free(listener.getsockname()[1])
    assert is_port_free(free_port())


def test_first_failure_of_all_nodes(tmp_path: Path) -> None:
    write_failure(node_logs(tmp_path, 0), 0, message="RuntimeError: Connection reset by peer", time=1.0)
    write_failure(node_logs(tmp_path, 1), 0, message="KeyError: 'x'", time=2.0)
    failure = job._first_failure(tmp_path, ["alpha", "beta", "gamma"])
    assert (failure.host, failure.error) == ("beta", "KeyError: 'x'")
    assert job._first_failure(tmp_path / "gone", ["alpha"]).is_user_error


APPTAINER = JobSettings(container="/images/my image.sif", mounts=("/scratch",))
PYXIS = JobSettings(container="nvcr.io#nvidia/pytorch:26.01", container_runtime="pyxis")
APPTAINER_ARGV = [f"--bind={WORKDIR}:{WORKDIR}", "--bind=/data:/data", f"--pwd={WORKDIR}", "/images/my image.sif"]
PYXIS_ARGV = [
    *("--container-image=nvcr.io#nvidia/pytorch:26.01", f"--container-mounts={WORKDIR}:{WORKDIR},/data:/data"),
    f"--container-workdir={WORKDIR}",
]


@pytest.mark.parametrize(
    ("settings", "gpus", "before_node", "srun"),
    [
        (APPTAINER, True, ["apptainer", "exec", "--nv", *APPTAINER_ARGV], []),
        (APPTAINER, False, ["apptainer", "exec", *APPTAINER_ARGV], []),
        (PYXIS, True, [], PYXIS_ARGV),
        (JobSettings(), True, [], []),
    ],
)
def test_container_arguments(settings: JobSettings, gpus: bool, before_node: list[str], srun: list[str]) -> None:
    mounts = [WORKDIR, Path("/data")]
    assert apptainer_argv(settings, mounts, WORKDIR, gpus=gpus) == before_node
    assert pyxis_options(settings, mounts, WORKDIR) == srun


def test_existing_folders_are_mounted_once(tmp_path: Path) -> None:
    folders = [tmp_path, None, tmp_path, tmp_path / "no"]
    assert mounted_folders(JobSettings(), folders) == []
    assert mounted_folders(APPTAINER, folders) == [tmp_path, Path("/scratch")]
    (with_comma := tmp_path / "a,b").mkdir()
    with pytest.raises(LaunchError, match="rename it"):
        mounted_folders(APPTAINER, [with_comma])


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return the working folder of a job whose srun is stopped by a signal to the batch shell, this process."""
    scripts = {
        "scontrol": f'echo "scontrol $*" >> {tmp_path}/log\n'
        'case "$1 $2" in\n"show hostnames") echo node1 ;;\n'
        '"show node") echo "NodeName=node1 NodeAddr=127.0.0.1" ;;\nesac',
        "squeue": "echo RUNNING None",
        "srun": f"trap 'echo forwarded >> {tmp_path}/log; exit 0' USR1\nkill -USR1 {os.getpid()}\n"
        "while :; do sleep 0.05; done",
    }
    for name, script in scripts.items():
        executable(tmp_path / "bin" / name, script)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
    for name, value in {**ENVIRONMENT, "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with restored_handlers(*STOP_SIGNALS):
        yield tmp_path


@pytest.mark.parametrize("refused", [False, True])
def test_signal_is_forwarded_and_the_job_requeued(
    refused: bool, cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if refused:
        with (cluster / "bin" / "scontrol").open("a") as file:
            file.write('[ "$1" != requeue ] || { echo disabled >&2; exit 1; }\n')
    assert job.main(["--data.root=x"]) == 75
    assert (cluster / "log").read_text().splitlines()[-2:] == ["forwarded", "scontrol requeue 5"]
    # `regraft status` reads the job id from this name.
    assert (cluster / "runs" / "regraft-5" / "logs" / "0001-job-5.0").is_dir()
    printed = capsys.readouterr().err
    assert "stopped by SIGUSR1 before training started" in printed
    assert ("could not be requeued (scontrol requeue failed: disabled)" in printed) is refused


def test_user_errors_start_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (cluster / "file").touch()
    for option, message in (
        ("--run.dir=file/run", "cannot be written to"),
        ("--run.dir=~nobody-here/run", "home folder"),
        ("--max-attempts=many", "expected a whole number"),
    ):
        assert job.main([option]) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert "start 1" not in printed
