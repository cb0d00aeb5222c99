from pathlib import Path

import pytest

from launch.local.command import Local, environment, processes_and_threads, split_options, torchrun
from launch.machine import gpus

LOCAL = Local(
    processes=3,
    threads=4,
    max_restarts=2,
    trainer=Path("/opt/re graft/trainer"),
    options=("--config", "a b.yaml", "--run.dir=$(touch x)"),
    logs=Path("/runs/a/logs/0001"),
)


@pytest.mark.parametrize(
    ("asked", "on_gpus", "cores", "expected"),
    [
        (None, 0, 2, (1, 2)),
        (None, 0, 8, (1, 8)),
        (None, 0, 64, (8, 8)),
        (None, 4, 64, (4, 8)),  # half of them beside a GPU: the others decode
        (None, 8, 8, (8, 1)),
        (2, 0, 64, (2, 32)),
        (2, 8, 64, (2, 16)),
        (5, 0, 2, (5, 1)),
    ],
)
def test_one_process_a_gpu_else_one_for_eight_cores(
    asked: int | None, on_gpus: int, cores: int, expected: tuple[int, int]
) -> None:
    assert processes_and_threads(asked, gpus=on_gpus, cores=cores) == expected


def test_torchrun_gets_a_port_and_an_id_of_its_own_and_the_options_word_by_word() -> None:
    command = torchrun(LOCAL)
    assert "--standalone" in command
    assert "--nproc-per-node=3" in command
    assert "--max-restarts=2" in command
    assert "--redirects=0:2,1:3,2:3" in command
    at = command.index("/opt/re graft/trainer/main.py")
    assert command[at + 1 :] == ["--config", "a b.yaml", "--run.dir=$(touch x)"]


def test_what_an_earlier_launcher_has_left_behind_is_not_passed_on() -> None:
    inherited = {
        "PATH": "/bin",
        "PET_NNODES": "4",
        "TORCHELASTIC_RUN_ID": "x",
        "ACCELERATE_MIXED_PRECISION": "fp16",
        "RANK": "3",
        "WORLD_SIZE": "8",
        "MASTER_PORT": "1",
        "NCCL_DEBUG": "INFO",
    }
    assert environment(LOCAL, inherited) == {
        "PATH": "/bin",
        "NCCL_DEBUG": "INFO",
        "OMP_NUM_THREADS": "4",
        "REGRAFT_LOGS": "/runs/a/logs/0001",
    }


def test_threads_that_a_user_has_set_stay() -> None:
    assert environment(LOCAL, {"OMP_NUM_THREADS": "1"})["OMP_NUM_THREADS"] == "1"


@pytest.mark.parametrize(
    ("words", "own", "others"),
    [
        (["--nproc", "2", "--optim.lr", "1"], ["--nproc", "2"], ["--optim.lr", "1"]),
        (["--optim.lr=1", "--nproc=2"], ["--nproc=2"], ["--optim.lr=1"]),
        (["--nproc"], ["--nproc"], []),
        (["--nprocs", "2"], [], ["--nprocs", "2"]),  # misspelt: the trainer will say so
        ([], [], []),
    ],
)
def test_the_launchers_words_are_parted_from_the_trainers(
    words: list[str], own: list[str], others: list[str]
) -> None:
    assert split_options(words, ("--nproc", "--max-restarts")) == (own, others)


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 3), ("", 0), ("0,2", 2), ("-1", 0), ("0,-1,1", 1), ("GPU-12ab", 1), ("0,1,2,3,4", 3)],
)
def test_gpus_are_counted_as_cuda_will_show_them(visible: str | None, expected: int, tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert gpus(environment, tmp_path) == expected
