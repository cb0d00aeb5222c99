import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launch.errors import LaunchError
from launch.slurm import node
from launch.slurm.node import Job, cores_and_gpus, parse, stage_folder, staged, torchrun
from tests.conftest import REPOSITORY

JOB = Job(
    addresses=("10.0.0.7", "10.0.0.12"),
    port=20123,
    rdzv_id="123.4",
    logs=Path("/runs/a b/logs/0001-job-123.4"),
    nproc=3,
    max_restarts=2,
    stage="$TMPDIR/x",
    options=("--config", "a b.yaml", "--", "--run.dir=$(touch x)"),
)


def test_the_words_of_a_job_are_read_again_to_the_same() -> None:
    assert parse(JOB.words()) == JOB
    plain = Job(addresses=("node1",), port=20001, rdzv_id="1.0", logs=Path("/l"))
    assert parse(plain.words()) == plain


@pytest.mark.parametrize(("number", "is_host"), [(0, "true"), (1, "false")])
def test_torchrun_meets_at_the_first_node(number: int, is_host: str) -> None:
    command = torchrun(
        JOB, node=number, processes=3, trainer=Path("/opt/trainer"), options=("--config", "a b")
    )
    assert command[1:3] == ["-m", "torch.distributed.run"]
    assert {
        "--nnodes=2",
        "--nproc-per-node=3",
        "--max-restarts=2",
        "--rdzv-backend=c10d",
        "--rdzv-id=123.4",
        "--rdzv-endpoint=10.0.0.7:20123",
        f"--local-addr={JOB.addresses[number]}",
        f"--log-dir=/runs/a b/logs/0001-job-123.4/node-{number}",
        # Rank 0 may be the first process of any node.
        "--redirects=0:2,1:3,2:3",
    } <= set(command)
    assert f"--rdzv-conf=is_host={is_host},join_timeout=3600,read_timeout=3600" in command
    assert command[-3:] == ["/opt/trainer/main.py", "--config", "a b"]


def test_an_address_of_ipv6_is_told_from_its_port() -> None:
    job = Job(addresses=("fd00::7",), port=20001, rdzv_id="1.0", logs=Path("/l"))
    command = torchrun(job, node=0, processes=1, trainer=Path("/t"), options=())
    assert "--rdzv-endpoint=[fd00::7]:20001" in command


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, (64, 8)),
        ({"SLURM_CPUS_ON_NODE": "16"}, (16, 8)),
        ({"SLURM_CPUS_ON_NODE": "16", "SLURM_CPUS_PER_TASK": "4"}, (4, 8)),
        ({"SLURM_CPUS_ON_NODE": "128"}, (64, 8)),
        ({"SLURM_CPUS_ON_NODE": "0"}, (1, 8)),
        ({"SLURM_CPUS_ON_NODE": "x(2)"}, (64, 8)),
        ({"SLURM_GPUS_ON_NODE": "2"}, (64, 2)),
    ],
)
def test_a_task_takes_what_slurm_gave_it(environment: dict[str, str], expected: tuple[int, int]) -> None:
    assert cores_and_gpus(environment, cores=64, gpus=8) == expected


STEP = {"SLURM_JOB_ID": "12", "SLURM_NODEID": "1"}


def test_data_is_copied_to_the_nodes_disk_and_gone_afterwards(tmp_path: Path) -> None:
    data, disk = tmp_path / "my data", tmp_path / "disk"
    (data / "train" / "a").mkdir(parents=True)
    (data / "train" / "a" / "1.jpg").write_bytes(b"x")
    options = [f"--data.root={data}", "--run.seed=1"]
    with staged(options, "$TMPDIR", {**STEP, "TMPDIR": str(disk)}) as words:
        copy = Path(words[-1].removeprefix("--data.root="))
        assert words[:-1] == tuple(options)
        assert copy.is_relative_to(disk)
        assert (copy / "train" / "a" / "1.jpg").read_bytes() == b"x"
    assert list(disk.iterdir()) == []


def test_what_a_killed_start_has_staged_is_made_anew(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "1.jpg").write_bytes(b"new")
    left = tmp_path / "disk" / "regraft-12-1" / "data"
    left.mkdir(parents=True)
    (left / "0.jpg").write_bytes(b"half")
    with staged([f"--data.root={data}"], str(tmp_path / "disk"), STEP) as words:
        copy = Path(words[-1].removeprefix("--data.root="))
        assert [path.name for path in copy.iterdir()] == ["1.jpg"]


def test_a_data_set_known_by_name_is_not_staged(capsys: pytest.CaptureFixture[str]) -> None:
    with staged(["--data.root=hotdog"], "/disk", STEP) as words:
        assert words == ("--data.root=hotdog",)
    assert "read where it is" in capsys.readouterr().err


def test_without_staging_nothing_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    with staged(["--data.root=hotdog"], None, STEP) as words:
        assert words == ("--data.root=hotdog",)
    assert capsys.readouterr().err == ""


def test_a_node_without_tmpdir_cannot_stage_there() -> None:
    with pytest.raises(LaunchError, match="sets no TMPDIR"):
        stage_folder("$TMPDIR/x", {})
    assert stage_folder("/local", {}) == Path("/local")


def test_data_that_cannot_be_staged_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "disk").write_text("a file")
    with (
        pytest.raises(LaunchError, match="make room"),
        staged([f"--data.root={tmp_path / 'data'}"], str(tmp_path / "disk"), STEP),
    ):
        pass


NODE = """\
import sys
from launch.slurm import node
sys.executable = sys.argv[1]
sys.exit(node.main(sys.argv[2:]))
"""


def started(tmp_path: Path, body: str) -> int:
    """Run a node's part, a process of its own, with a shell script in torchrun's place; returns its exit code."""
    script = tmp_path / "torchrun"
    script.write_text(f"#!/bin/sh\n{body}\n")
    script.chmod(stat.S_IRWXU)
    job = Job(addresses=("127.0.0.1",), port=20001, rdzv_id="1.0", logs=tmp_path / "logs", nproc=1)
    done = subprocess.run(
        [sys.executable, "-c", NODE, script, *job.words()],
        env={**os.environ, "SLURM_NODEID": "0"},
        cwd=REPOSITORY,
        check=False,
        timeout=60,
    )
    return done.returncode


def test_a_node_leaves_with_0_after_a_stop(tmp_path: Path) -> None:
    # torchrun's code after a signal is 1; srun would end the other nodes for it.
    body = "trap 'exit 1' TERM; kill -USR1 $PPID; while :; do sleep 0.05; done"
    assert started(tmp_path, body) == 0


def test_a_node_waits_for_those_who_save_when_torchrun_is_gone(tmp_path: Path) -> None:
    # Slurm signals every process of a step: the third TERM is too many for torchrun.
    saves = tmp_path / "saves"
    saves.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 1\ntouch {tmp_path / 'saved'}\n")
    saves.chmod(stat.S_IRWXU)
    body = f"trap 'exit 1' TERM; {saves} > /dev/null & kill -TERM $PPID; while :; do sleep 0.05; done"
    assert started(tmp_path, body) == 0
    assert (tmp_path / "saved").exists()


def test_usr1_that_slurm_gives_to_all_does_not_end_torchrun(tmp_path: Path) -> None:
    assert started(tmp_path, "kill -USR1 $$; kill -USR2 $$; exit 0") == 0


def test_a_node_says_that_it_failed(tmp_path: Path) -> None:
    assert started(tmp_path, "exit 1") == 1
    assert started(tmp_path, "exit 0") == 0


def test_an_error_of_the_users_is_not_started_again_by_torchrun(tmp_path: Path) -> None:
    folder = tmp_path / "logs" / "node-0" / "1.0_x" / "attempt_0" / "0"
    content = json.dumps({"message": {"message": "error: no such option", "extraInfo": {"timestamp": "1"}}})
    writes = f"mkdir -p {folder}; echo '{content}' > {folder}/error.json"
    body = f"trap 'exit 1' TERM; {writes}; while :; do sleep 0.05; done"
    assert started(tmp_path, body) == 2


@pytest.mark.parametrize("number", ["", "1", "x"])
def test_a_node_that_is_not_of_the_job_is_refused(
    number: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_NODEID", number)
    job = Job(addresses=("127.0.0.1",), port=20001, rdzv_id="1.0", logs=Path("/nowhere"))
    assert node.main(job.words()) == 1
    assert "sbatch slurm/finetune.sh" in capsys.readouterr().err
