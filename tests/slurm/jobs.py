"""Helpers for tests with tiny runs as Slurm jobs."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest

from tests import runs
from tests.launching import MAIN, REPOSITORY
from tests.slurm.cluster import Cluster

FINETUNE, ARRAY = REPOSITORY / "slurm" / "finetune.sh", REPOSITORY / "slurm" / "array.sh"


def run_options(factory: pytest.TempPathFactory, folder: Path, **changes: object) -> list[str]:
    """Return the trainer's options of a tiny run whose result does not depend on the number of processes."""
    return runs.options(
        factory, folder, **runs.WORLD_SIZE_INDEPENDENT, run__device="cpu", data__num_workers=0, **changes
    )


def with_sitecustomize(folder: Path, code: str) -> dict[str, str]:
    """Return environment variables that make Python run this code when it starts."""
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("PYTHONPATH")]))}


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int, *, after: int = 0) -> int:
    """Wait until an attempt later than `after` has made the update `step`, and return the last update."""
    cluster.wait(job, lambda: runs.training_attempt(folder) > after and runs.last_step(folder) >= step, f"step {step}")
    return runs.last_step(folder)


def wait_for_checkpoint(cluster: Cluster, job: str, folder: Path, *, attempt: int) -> None:
    """Wait until an attempt, the last one of a job, has saved a new step."""

    def has_new_step() -> bool:
        *earlier, last = [0, *(row["step"] for row in runs.attempts(folder))]
        return len(earlier) == attempt and last > max(earlier)

    cluster.wait(job, has_new_step, "a new step is saved")


def wait_for_restart(cluster: Cluster, job: str, restarts: int) -> None:
    """Wait until Slurm has restarted a job this number of times."""
    state = {"Restarts": str(restarts), "JobState": "RUNNING"}
    cluster.wait(job, lambda: state.items() <= cluster.record(job).items(), f"job {job}: restart {restarts}")


def wait_for_exit(cluster: Cluster, job: str) -> None:
    """Wait until no process of a job is left that could still requeue it."""
    cluster.wait(job, lambda: not cluster.processes_of(job), f"{job}: all exited", also_after_end=True)


class Rank(NamedTuple):
    """A process of the trainer."""

    rank: int
    pid: int
    node: str


def ranks(cluster: Cluster, job: str) -> list[Rank]:
    """Return the trainer's processes of a job, without their data-loading workers."""
    return sorted(
        Rank(int(variables["RANK"]), pid, variables["SLURMD_NODENAME"])
        for pid, variables in cluster.processes_of(job).items()
        if "RANK" in variables and str(MAIN) in runs._read(pid, "cmdline")
    )


def require_result_of_one_process(folder: Path, factory: pytest.TempPathFactory) -> None:
    """Check that each epoch has seen each example once, and that the result is that of a run with one process."""
    runs.assert_each_example_once(folder)
    reference = runs.uninterrupted(factory, "python", **runs.WORLD_SIZE_INDEPENDENT)
    runs.assert_close(folder, reference)
