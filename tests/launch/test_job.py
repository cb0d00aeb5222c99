import json
import os
import signal
import stat
from dataclasses import replace
from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm import job
from launch.slurm.allocation import Allocation, allocation, find_addresses, is_free, port_of
from launch.slurm.container import mounts_of, prefix, srun_words
from launch.slurm.job import settle, srun, step_environment
from launch.slurm.node import node_logs
from launch.slurm.settings import Settings, sweep_options
from tests.launching import free_port

JOB = Allocation(
    job_id="123",
    array_id=None,
    task=None,
    name="regraft",
    nodes="node[1-2]",
    restarts=0,
    cpus_per_task="4",
)
TASK = replace(JOB, job_id="130", array_id="123", task=7)
HERE = Path("/home/u/my project")


# Where the run lies.


@pytest.mark.parametrize(
    ("options", "given", "expected"),
    [
        (["--data.root=x"], JOB, "/home/u/my project/runs/regraft-123"),
        ([], JOB, "/home/u/my project/runs/regraft-123"),  # the quickstart's folder is one for all jobs
        (["--run.dir", "runs/a b"], JOB, "/home/u/my project/runs/a b"),
        (["--run.dir=/scratch/$(touch x)"], JOB, "/scratch/$(touch x)"),
        (["--data.root=x"], TASK, "/home/u/my project/runs/regraft-123_7"),
        (["--run.dir=runs/a"], TASK, "/home/u/my project/runs/a/7"),
        (
            ["--data.root=x"],
            replace(JOB, name="../$(touch x) a"),
            "/home/u/my project/runs/..___touch_x__a-123",
        ),
    ],
)
def test_a_job_has_one_run_folder(options: list[str], given: Allocation, expected: str) -> None:
    folder, words = settle(options, Settings(), given, HERE)
    assert folder == Path(expected)
    assert words == (*options, f"--run.dir={expected}")
    again, _ = settle(options, Settings(), replace(given, restarts=3), HERE)
    assert again == folder


def test_a_config_that_names_a_run_folder_is_heard(tmp_path: Path) -> None:
    config = tmp_path / "c.yaml"
    config.write_text("run:\n  dir: runs/from config\n")
    assert settle(["--config", str(config)], Settings(), JOB, HERE)[0] == HERE / "runs/from config"


def test_never_was_meant_for_the_first_start() -> None:
    options = ["--run.resume=never"]
    assert "--run.resume=auto" not in settle(options, Settings(), JOB, HERE)[1]
    assert settle(options, Settings(), replace(JOB, restarts=1), HERE)[1][-1] == "--run.resume=auto"


# Sweeps.


def test_a_sweep_over_seeds_numbers_them() -> None:
    _, words = settle(["--data.root=x"], Settings(sweep="seeds"), TASK, HERE)
    assert words[:2] == ("--data.root=x", "--run.seed=7")


def test_each_task_takes_its_line(tmp_path: Path) -> None:
    file = tmp_path / "sweep.txt"
    file.write_text("# learning rates\n--optim.lr 0.1\n\n--optim.lr 0.01 --run.dir '/s/a b'\n")
    options = ["--run.dir=runs/a"]
    chosen = Settings(sweep=str(file))
    first, words = settle(options, chosen, replace(TASK, task=0), HERE)
    assert words == ("--run.dir=runs/a", "--optim.lr", "0.1", f"--run.dir={HERE}/runs/a/0")
    assert first == HERE / "runs/a/0"
    assert settle(options, chosen, replace(TASK, task=1), HERE)[0] == Path("/s/a b")
    with pytest.raises(LaunchError, match="has 2 lines of options, none for task 2; expected --array=0-1"):
        sweep_options(str(file), 2)


@pytest.mark.parametrize(
    ("text", "words"), [("--run.dir 'a\n", "line 1: No closing quotation"), ("# none\n", "holds no options")]
)
def test_a_sweeps_file_that_is_wrong_is_named(text: str, words: str, tmp_path: Path) -> None:
    (tmp_path / "s").write_text(text)
    with pytest.raises(LaunchError, match=words):
        sweep_options(str(tmp_path / "s"), 0)
    with pytest.raises(LaunchError, match="cannot be read"):
        sweep_options(str(tmp_path / "nowhere"), 0)


# What Slurm says.

ENVIRONMENT = {
    "SLURM_JOB_ID": "130",
    "SLURM_JOB_NODELIST": "node[1-2]",
    "SLURM_JOB_NAME": "regraft",
    "SLURM_CPUS_PER_TASK": "4",
}


def test_a_start_is_read_from_the_environment() -> None:
    assert allocation(ENVIRONMENT) == replace(JOB, job_id="130")
    array = {"SLURM_ARRAY_JOB_ID": "123", "SLURM_ARRAY_TASK_ID": "7", "SLURM_RESTART_COUNT": "2"}
    found = allocation({**ENVIRONMENT, **array})
    assert found == replace(TASK, restarts=2)
    # The array's last task bears the array's own id, which means all of them.
    assert found.label == "123_7"
    assert found.rdzv_id == "130.2"


@pytest.mark.parametrize("missing", ["SLURM_JOB_ID", "SLURM_JOB_NODELIST"])
def test_outside_a_job_it_says_how_to_start_one(missing: str) -> None:
    rest = {name: value for name, value in ENVIRONMENT.items() if name != missing}
    with pytest.raises(LaunchError, match=r"sbatch slurm/finetune\.sh"):
        allocation(rest)


SHOWN = (
    "NodeName=node2 Arch=x86_64 NodeAddr=10.0.0.2 NodeHostName=vm Version=22.05\n"
    "NodeName=node1 Arch=x86_64 NodeAddr=gpu1-ib NodeHostName=gpu1 Version=22.05\n"
)


def test_an_address_is_one_that_resolves() -> None:
    assert find_addresses(["node1", "node2"], SHOWN, lambda _: True) == ("gpu1-ib", "10.0.0.2")
    assert find_addresses(["node1", "node2"], SHOWN, lambda name: name != "gpu1-ib") == ("gpu1", "10.0.0.2")
    assert find_addresses(["node9"], SHOWN, lambda name: name == "node9") == ("node9",)
    with pytest.raises(LaunchError, match="node node1: none of gpu1-ib, gpu1, node1 is an address"):
        find_addresses(["node1"], SHOWN, lambda _: False)


@pytest.mark.parametrize("job_id", ["1", "9999", "10000", "4294901757"])
def test_a_port_is_the_jobs_own_and_below_those_that_the_system_gives_away(job_id: str) -> None:
    port = port_of(job_id, lambda _: True)
    assert 20_000 <= port < 32_768
    following = port_of(job_id, lambda candidate: candidate != port)
    assert 20_000 <= following < 32_768
    assert following != port
    with pytest.raises(LaunchError, match="no port"):
        port_of(job_id, lambda _: False)


def test_a_port_in_use_is_not_free() -> None:
    import socket

    port = free_port()
    assert is_free(port)
    with socket.socket() as taken:
        taken.bind(("", port))
        taken.listen()
        assert not is_free(port)


def test_the_first_failure_is_sought_on_all_nodes(tmp_path: Path) -> None:
    for number, message, when in (
        (0, "RuntimeError: Connection reset by peer", 1.0),
        (1, "KeyError: 'x'", 2.0),
    ):
        folder = node_logs(tmp_path, number) / "1.0_x" / "attempt_0" / "0"
        folder.mkdir(parents=True)
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(when)}}}
        (folder / "error.json").write_text(json.dumps(content))
    failure = job._first(tmp_path, ["alpha", "beta", "gamma"])
    assert (failure.host, failure.what) == ("beta", "KeyError: 'x'")


# The step.


def test_srun_starts_one_task_a_node_and_ends_all_when_one_fails() -> None:
    command = srun(JOB, 2, Settings(), [], HERE)
    assert command[0] == "srun"
    assert {
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--kill-on-bad-exit=1",
        "--wait=60",
        "--export=ALL",
    } <= set(command)


def test_srun_is_told_the_cores_that_it_does_not_inherit() -> None:
    assert step_environment(JOB, {"A": "b"}) == {"A": "b", "SRUN_CPUS_PER_TASK": "4"}
    assert step_environment(replace(JOB, cpus_per_task=None), {"A": "b"}) == {"A": "b"}


@pytest.mark.parametrize(("gpus", "nv"), [(True, ["--nv"]), (False, [])])
def test_apptainer_stands_around_the_nodes_program(gpus: bool, nv: list[str]) -> None:
    chosen = Settings(container="/images/my image.sif")
    mounts = [HERE, Path("/data")]
    assert prefix(chosen, mounts, HERE, gpus=gpus) == [
        "apptainer",
        "exec",
        *nv,
        f"--bind={HERE}:{HERE}",
        "--bind=/data:/data",
        f"--pwd={HERE}",
        "/images/my image.sif",
    ]
    assert srun_words(chosen, mounts, HERE) == []


def test_pyxis_is_an_option_of_srun() -> None:
    chosen = Settings(container="nvcr.io#nvidia/pytorch:26.01", container_runtime="pyxis")
    assert srun_words(chosen, [HERE, Path("/data")], HERE) == [
        "--container-image=nvcr.io#nvidia/pytorch:26.01",
        f"--container-mounts={HERE}:{HERE},/data:/data",
        f"--container-workdir={HERE}",
    ]
    assert prefix(chosen, [HERE], HERE, gpus=True) == []


def test_without_a_container_nothing_is_mounted(tmp_path: Path) -> None:
    assert mounts_of(Settings(), [tmp_path]) == []
    assert prefix(Settings(), [], HERE, gpus=True) == srun_words(Settings(), [], HERE) == []


def test_what_is_there_is_mounted_once_and_nothing_that_would_be_two(tmp_path: Path) -> None:
    chosen = Settings(container="x.sif", mounts=("/scratch",))
    assert mounts_of(chosen, [tmp_path, None, tmp_path, tmp_path / "no"]) == [tmp_path, Path("/scratch")]
    (split := tmp_path / "a,b").mkdir()
    with pytest.raises(LaunchError, match="rename it"):
        mounts_of(chosen, [split])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"nproc": 0}, "--nproc 0"),
        ({"max_attempts": 0}, "--max-attempts 0"),
        ({"container": "-x"}, "--container"),
        ({"container": "a\nb"}, "--container"),
        ({"container_runtime": "docker"}, "apptainer or pyxis"),
        ({"mounts": ("relative",)}, "--mount"),
        ({"mounts": ("/a:/b",)}, "--mount"),
        ({"sweep": ""}, "--sweep"),
    ],
)
def test_impossible_settings_are_named(changes: dict[str, object], words: str) -> None:
    with pytest.raises(LaunchError, match=words):
        Settings(**changes)  # type: ignore[arg-type]


# A whole start, with programs in Slurm's place that only answer (tests/slurm has the real one).

SCONTROL = """\
#!/bin/sh
echo "scontrol $*" >> {log}
case "$1 $2" in
"show hostnames") echo node1 ;;
"show node") echo "NodeName=node1 NodeAddr=127.0.0.1" ;;
esac
"""


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    programs = tmp_path / "bin"
    programs.mkdir()
    answers = {
        "scontrol": SCONTROL.format(log=tmp_path / "log"),
        "squeue": "#!/bin/sh\necho RUNNING None\n",
        "srun": f"#!/bin/sh\necho srun >> {tmp_path / 'log'}\nexit 1\n",
    }
    for name, text in answers.items():
        (programs / name).write_text(text)
        (programs / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    for name, value in {**ENVIRONMENT, "SLURM_JOB_ID": "5"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    earlier = {number: signal.getsignal(number) for number in job.SIGNALS}
    yield tmp_path
    for number, handler in earlier.items():
        signal.signal(number, handler)


def called(cluster: Path) -> list[str]:
    return (cluster / "log").read_text().splitlines()


def test_a_start_that_fails_at_once_is_not_queued_again(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert job.main(["--data.root=x"]) == 1
    assert "srun" in called(cluster)
    # Whose name status reads the job from.
    assert (cluster / "runs" / "regraft-5" / "logs" / "0001-job-5.0").is_dir()
    assert not [line for line in called(cluster) if "requeue" in line]
    assert "nothing new was saved" in capsys.readouterr().err


def test_a_signal_is_passed_on_and_the_job_queued_again(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Slurm gives it to the batch shell alone, which this process is.
    (cluster / "bin" / "srun").write_text(
        f"#!/bin/sh\ntrap 'echo passed on >> {cluster / 'log'}; exit 0' USR1\nkill -USR1 {os.getpid()}\n"
        "while :; do sleep 0.05; done\n"
    )
    assert job.main(["--data.root=x"]) == 75
    assert "passed on" in called(cluster)
    assert called(cluster)[-1] == "scontrol requeue 5"
    assert "stopped by SIGUSR1 before training began" in capsys.readouterr().err


def test_a_job_that_slurm_will_not_queue_again_says_so(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "bin" / "srun").write_text(f"#!/bin/sh\nkill -TERM {os.getpid()}\nsleep 0.2\n")
    with (cluster / "bin" / "scontrol").open("a") as file:
        file.write('[ "$1" != requeue ] || { echo disabled >&2; exit 1; }\n')
    assert job.main(["--data.root=x"]) == 75
    assert "could not be queued again (scontrol requeue has failed: disabled)" in capsys.readouterr().err


def test_done_is_done(cluster: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.launch.test_requeue import attempt

    monkeypatch.setattr(job.contract, "all_attempts", lambda _: (attempt(1, "done", step=9),))
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert job.main(["--data.root=x"]) == 0
    assert not (cluster / "log").exists()


def test_a_run_folder_that_cannot_be_is_an_error_of_the_users(
    cluster: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (cluster / "file").touch()
    for folder, words in (
        (cluster / "file" / "run", "cannot be written to"),
        ("~nobody-here/run", "home folder"),
    ):
        assert job.main([f"--run.dir={folder}"]) == 2
        assert words in capsys.readouterr().err
    assert "srun" not in called(cluster)


def test_a_wrong_setting_starts_nothing(cluster: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert job.main(["--max-attempts", "many"]) == 2
    assert "expected a whole number" in capsys.readouterr().err
    assert not (cluster / "log").exists()
