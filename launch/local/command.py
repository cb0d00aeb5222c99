"""What to launch -> torchrun's command line and environment. Pure functions."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.contract import LOG_FOLDER

CORES_A_PROCESS = 8
"""Cores beyond which one process gains little from another thread, so that a second process is worth starting."""
_LEAKING = ("PET_", "TORCHELASTIC_", "ACCELERATE_")
_LEFT_BY_LAUNCHERS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "ROLE_RANK",
    "ROLE_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


@dataclass(frozen=True, kw_only=True)
class Local:
    """A run on this machine."""

    processes: int
    threads: int
    """CPU threads of each process."""
    max_restarts: int
    """How often torchrun starts failed processes again."""
    trainer: Path
    """The trainer's folder."""
    options: tuple[str, ...]
    """Of the trainer's command line, as they were given."""
    logs: Path
    """Folder of this launch."""


def processes_and_threads(asked: int | None, *, gpus: int, cores: int) -> tuple[int, int]:
    """Return how many processes to start, and CPU threads of each: one process a GPU, else one for 8 cores."""
    processes = asked or gpus or max(1, cores // CORES_A_PROCESS)
    threads = max(1, cores // processes)
    return processes, threads if not gpus else max(1, threads // 2)


def torchrun(local: Local) -> list[str]:
    """Return the command line: a free port and an id of its own; rank 0's output stays, all else goes to files."""
    redirects = ",".join(["0:2", *(f"{rank}:3" for rank in range(1, local.processes))])
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nnodes=1",
        f"--nproc-per-node={local.processes}",
        f"--max-restarts={local.max_restarts}",
        f"--log-dir={local.logs}",
        f"--redirects={redirects}",
        str(local.trainer / "main.py"),
        *local.options,
    ]


def environment(local: Local, inherited: Mapping[str, str]) -> dict[str, str]:
    """Return the processes' environment: what an earlier launcher has left behind is not theirs.

    `PET_*` would set options of torchrun, `RANK` and its like would make the processes part of another group.
    """
    return {"OMP_NUM_THREADS": str(local.threads), **clean(inherited), LOG_FOLDER: str(local.logs)}


def clean(inherited: Mapping[str, str]) -> dict[str, str]:
    """Return an environment without what an earlier launcher has left behind."""
    return {
        name: value
        for name, value in inherited.items()
        if not name.startswith(_LEAKING) and name not in _LEFT_BY_LAUNCHERS
    }


def split_options(words: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Part a command line into the launcher's words (`--name value` or `--name=value` of `own`) and the trainer's."""
    mine: list[str] = []
    theirs: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        if name in own:
            mine.append(word)
            if not equals and rest:
                mine.append(rest.pop(0))
        else:
            theirs.append(word)
    return mine, theirs
