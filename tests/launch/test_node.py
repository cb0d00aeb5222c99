import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm import node
from launch.slurm.node import NodeTask, cores_and_gpus, parse, rendezvous_options, stage_folder, staged_data
from tests.conftest import REPOSITORY
from tests.launch.helpers import executable

TASK = NodeTask(
    **{"addresses": ("10.0.0.7", "10.0.0.12"), "port": 20123, "rdzv_id": "123.4", "stage": "$TMPDIR/x"},
    **{"logs": Path("/runs/a b/logs/0001-job-123.4"), "nproc": 3, "max_restarts": 2},
    options=("--config", "a b.yaml", "--", "--run.dir=$(touch x)"),
)
MINIMAL_TASK = NodeTask(addresses=("fd00::7",), port=20001, rdzv_id="1.0", logs=Path("/l"))


@pytest.mark.parametrize(("number", "is_host"), [(0, "true"), (1, "false")])
def test_nodes_meet_at_the_first_one(number: int, is_host: str) -> None:
    assert [parse(task.to_argv()) for task in (TASK, MINIMAL_TASK)] == [TASK, MINIMAL_TASK]
    assert set(rendezvous_options(TASK, node=number)) == {
        "--nnodes=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=123.4",
        "--rdzv-endpoint=10.0.0.7:20123",
        f"--rdzv-conf=is_host={is_host},join_timeout=3600,read_timeout=3600",
        f"--local-addr={TASK.addresses[number]}",
    }
    assert "--rdzv-endpoint=[fd00::7]:20001" in rendezvous_options(MINIMAL_TASK, node=0)


def test_task_uses_only_what_slurm_allocated() -> None:
    for environment, expected in (
        ({}, (64, 8)),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_GPUS_ON_NODE": "2"}, (16, 2)),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "4"}, (4, 8)),
        ({"SLURM_CPUS_ON_NODE": "128"}, (64, 8)),
        ({"SLURM_CPUS_ON_NODE": "0"}, (1, 8)),
        ({"SLURM_CPUS_ON_NODE": "x(2)"}, (64, 8)),
    ):
        assert cores_and_gpus(environment, cores=64, gpus=8) == expected


STEP = {"SLURM_JOB_ID": "12", "SLURM_NODEID": "1"}


def test_data_is_copied_to_the_local_disk_and_removed_afterwards(tmp_path: Path) -> None:
    data, disk = tmp_path / "my data", tmp_path / "disk"
    (data / "train" / "a").mkdir(parents=True)
    (data / "train" / "a" / "1.jpg").write_bytes(b"x")
    left_by_killed_start = disk / "regraft-12-1" / "my data" / "0.jpg"
    left_by_killed_start.parent.mkdir(parents=True)
    left_by_killed_start.touch()
    given = [f"--data.root={data}", "--run.seed=1"]
    with staged_data(given, "$TMPDIR", {**STEP, "TMPDIR": str(disk)}) as options:
        copy = Path(options[-1].removeprefix("--data.root="))
        assert options[:-1] == tuple(given)
        assert copy.is_relative_to(disk)
        assert [path.relative_to(copy) for path in copy.rglob("*.jpg")] == [Path("train/a/1.jpg")]
        assert (copy / "train" / "a" / "1.jpg").read_bytes() == b"x"
    assert list(disk.iterdir()) == []


def test_data_that_cannot_be_copied_is_an_error_but_a_name_is_not(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (None, "/disk"):
        assert not capsys.readouterr().err
        with staged_data(["--data.root=hotdog"], folder, STEP) as options:
            assert options == ("--data.root=hotdog",)
    assert "is not copied" in capsys.readouterr().err
    assert stage_folder("/local", {}) == Path("/local")
    with pytest.raises(LaunchError, match="TMPDIR is not set"):
        stage_folder("$TMPDIR/x", {})
    (tmp_path / "data").mkdir()
    (tmp_path / "disk").write_text("a file")
    with (
        pytest.raises(LaunchError, match="free some space"),
        staged_data([f"--data.root={tmp_path / 'data'}"], str(tmp_path / "disk"), STEP),
    ):
        pass


def run_node(tmp_path: Path, script: str) -> int:
    """Run a node in a process of its own, with a shell script in place of torchrun, and return its exit code."""
    program = "import sys; from launch.slurm import node; sys.executable = sys.argv[1]; exit(node.main(sys.argv[2:]))"
    torchrun = executable(tmp_path / "torchrun", script)
    task = NodeTask(addresses=("127.0.0.1",), port=20001, rdzv_id="1.0", logs=tmp_path / "logs", nproc=1)
    command = [sys.executable, "-c", program, torchrun, *task.to_argv()]
    variables = {**os.environ, "SLURM_NODEID": "0"}
    return subprocess.run(command, env=variables, cwd=REPOSITORY, check=False, timeout=60).returncode


USER_ERROR = {"message": {"message": "error: no such option", "extraInfo": {"timestamp": "1"}}}
WAIT_FOR_SIGTERM = "while :; do sleep 0.05; done"


@pytest.mark.parametrize(
    ("script", "code"),
    [
        pytest.param("exit 1", 1, id="failure"),
        # torchrun exits with 1 after a signal, for which srun would kill the other nodes.
        pytest.param(f"trap 'exit 1' TERM; kill -USR1 $PPID; {WAIT_FOR_SIGTERM}", 0, id="stop"),
        # Slurm sends SIGUSR1 to all processes of a step.
        pytest.param("kill -USR1 $$; kill -USR2 $$; exit 0", 0, id="torchrun ignores SIGUSR1"),
        pytest.param(
            "trap 'exit 1' TERM; mkdir -p FOLDER; "
            f"echo '{json.dumps(USER_ERROR)}' > FOLDER/error.json; {WAIT_FOR_SIGTERM}",
            2,
            id="torchrun is terminated after a user error",
        ),
        # Slurm signals every process of a step, and the third SIGTERM ends torchrun before its processes.
        pytest.param(
            f"trap 'exit 1' TERM; TMP/save > /dev/null & kill -TERM $PPID; {WAIT_FOR_SIGTERM}", 0, id="orphans may save"
        ),
    ],
)
def test_exit_code_of_a_node(tmp_path: Path, script: str, code: int) -> None:
    executable(tmp_path / "save", f"trap '' TERM\nsleep 1\ntouch {tmp_path}/saved")
    folder = tmp_path / "logs" / "node-0" / "1.0_x" / "attempt_0" / "0"
    assert run_node(tmp_path, script.replace("FOLDER", str(folder)).replace("TMP", str(tmp_path))) == code
    assert (tmp_path / "saved").exists() is ("save" in script)


def test_wrong_node_id_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for number in ("", "1", "x"):
        monkeypatch.setenv("SLURM_NODEID", number)
        assert node.main(MINIMAL_TASK.to_argv()) == 1
        assert "sbatch slurm/finetune.sh" in capsys.readouterr().err
