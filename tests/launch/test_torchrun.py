from pathlib import Path

from launch.local.torchrun import TorchrunConfig, torchrun_command, trainer_environment
from launch.machine import gpus, processes_and_threads
from launch.options import split_options

CONFIG = TorchrunConfig(
    **{"processes": 3, "threads": 4, "max_restarts": 2, "trainer": Path("/opt/re graft/trainer")},
    options=("--config", "a b.yaml", "--run.dir=$(touch x)"),
    logs=Path("/runs/a/logs/0001"),
)


def test_one_process_per_gpu_or_per_8_cores() -> None:
    for (nproc, gpus_, cores), expected in (
        ((None, 0, 2), (1, 2)),
        ((None, 0, 8), (1, 8)),
        ((None, 0, 64), (8, 8)),
        ((None, 4, 64), (4, 8)),  # with GPUs, half of the cores decode images
        ((None, 8, 8), (8, 1)),
        ((2, 0, 64), (2, 32)),
        ((2, 8, 64), (2, 16)),
        ((5, 0, 2), (5, 1)),
    ):
        assert processes_and_threads(nproc, gpus=gpus_, cores=cores) == expected


def test_torchrun_chooses_the_port_and_the_options_are_unchanged() -> None:
    command = torchrun_command(CONFIG)
    expected = {"--standalone", "--nproc-per-node=3", "--max-restarts=2", "--redirects=0:2,1:3,2:3"}
    assert expected <= set(command)
    assert command[-4:] == ["/opt/re graft/trainer/main.py", *CONFIG.options]


def test_variables_of_an_outer_launcher_are_dropped() -> None:
    kept = {"PATH": "/bin", "NCCL_DEBUG": "INFO"}
    dropped = ["PET_NNODES", "TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION", "RANK", "WORLD_SIZE", "MASTER_PORT"]
    expected = {**kept, "OMP_NUM_THREADS": "4", "REGRAFT_LOGS": "/runs/a/logs/0001"}
    assert trainer_environment(CONFIG, kept | dict.fromkeys(dropped, "1")) == expected
    own_threads = trainer_environment(CONFIG, {"OMP_NUM_THREADS": "1"})
    assert own_threads["OMP_NUM_THREADS"] == "1", "a value set by the user stays"


def test_options_are_split_between_launcher_and_trainer() -> None:
    for argv, launcher, trainer in (
        (["--nproc", "2", "--optim.lr", "1"], ["--nproc", "2"], ["--optim.lr", "1"]),
        (["--optim.lr=1", "--nproc=2"], ["--nproc=2"], ["--optim.lr=1"]),
        (["--nproc"], ["--nproc"], []),
        (["--nprocs", "2"], [], ["--nprocs", "2"]),  # a misspelled option: the trainer reports it
    ):
        assert split_options(argv, ("--nproc", "--max-restarts")) == (launcher, trainer)


def test_gpus_are_counted_as_cuda_shows_them(tmp_path: Path) -> None:
    for name in ("nvidia0", "nvidia1", "nvidia2", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert gpus({}, tmp_path) == 3
    for visible, expected in (("", 0), ("0,2", 2), ("-1", 0), ("0,-1,1", 1), ("GPU-12ab", 1), ("0,1,2,3,4", 3)):
        assert gpus({"CUDA_VISIBLE_DEVICES": visible}, tmp_path) == expected
