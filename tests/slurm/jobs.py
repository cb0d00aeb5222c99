"""What the tests of this folder have in common: tiny runs as Slurm's jobs, and what becomes of them."""

from pathlib import Path
from typing import NamedTuple

import pytest

from tests.kills import (
    SAME_ANYWHERE,
    attempts,
    last_step,
    options,
    pictures,
    require_close,
    require_each_once,
    trained_by,
    whole_run,
)
from tests.launching import MAIN, REPOSITORY
from tests.slurm.cluster import Cluster

FINETUNE, ARRAY = REPOSITORY / "slurm" / "finetune.sh", REPOSITORY / "slurm" / "array.sh"
LOSSES, WEIGHTS = 1e-5, 1e-5


def words(factory: pytest.TempPathFactory, folder: Path, **changes: object) -> list[str]:
    """Return the trainer's options of a tiny run whose result does not depend on who computes it."""
    return options(pictures(factory), folder, **SAME_ANYWHERE, run__device="cpu", data__workers=0, **changes)


def wait_for_step(cluster: Cluster, job: str, folder: Path, step: int, *, after: int = 0) -> int:
    """Wait until an attempt later than `after` has made the run's update `step`; returns the last one then."""
    cluster.wait(job, lambda: trained_by(folder) > after and last_step(folder) >= step, f"step {step}")
    return last_step(folder)


def wait_until_saved(cluster: Cluster, job: str, folder: Path, *, start: int) -> int:
    """Wait until a start of a job (from 0), with one attempt each, has saved a step that is new; returns it."""

    def saved() -> list[int]:
        return [0, *(attempt["step"] for attempt in attempts(folder))]

    cluster.wait(
        job, lambda: len(saved()) == start + 2 and saved()[-1] > max(saved()[:-1]), "something new is saved"
    )
    return saved()[-1]


def wait_for_restart(cluster: Cluster, job: str, restarts: int) -> None:
    """Wait until Slurm has started a job again so many times."""
    cluster.wait(
        job,
        lambda: (cluster.restarts(job), cluster.state(job)) == (restarts, "RUNNING"),
        f"job {job}: restart {restarts}",
    )


class Rank(NamedTuple):
    """A process of the trainer."""

    rank: int
    pid: int
    node: str


def ranks(cluster: Cluster, job: str) -> list[Rank]:
    """Return the trainer's processes of a job, without those that load its data."""
    found = cluster.processes_of(job).items()
    return sorted(
        Rank(int(variables["RANK"]), pid, variables["SLURMD_NODENAME"])
        for pid, variables in found
        if "RANK" in variables and str(MAIN) in _command(pid)
    )


def _command(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:  # it has ended
        return ""


def wait_until_all_have_left(cluster: Cluster, job: str) -> None:
    """Wait until nothing of a job is left that could still ask Slurm for something."""
    cluster.wait(job, lambda: not cluster.processes_of(job), f"{job}: all have left", also_after=True)


def require_as_one_process(folder: Path, factory: pytest.TempPathFactory) -> None:
    """Check that a run has seen each example once an epoch, and that its result is that of one process."""
    require_each_once(folder)
    require_close(folder, whole_run(factory, "python", **SAME_ANYWHERE), losses=LOSSES, weights=WEIGHTS)
