"""A rank that hangs: noticed in the time allowed, all stacks written, the run started again and its end equal."""

import os
import random
import re
import signal
import socket
import time
from pathlib import Path

import pytest

from launch.failures import first_failure, restart_dirs
from tests.kills import (
    EPOCHS,
    STEPS,
    Run,
    assert_equal_runs,
    attempts,
    children,
    options,
    pictures,
    require_each_once,
    saved_step,
    started,
    whole_run,
)
from tests.launching import MAIN, torchrun

ALLOWED = 12
"""Seconds; more than a step takes on a machine that is busy with other tests, the first one included."""


def trainer(run: Run, rank: int) -> int:
    """Return the process of a rank."""
    (found,) = (
        pid
        for pid in run.trainers()
        if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0")
    )
    return found


def stacks(folder: Path, *, attempt: int, rank: int) -> str:
    path = folder / "hangs" / f"{attempt:04}-rank-{rank}.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_a_rank_whose_loader_comes_no_more(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    print(f"seed {(seed := random.randrange(1 << 30))}")
    random_ = random.Random(seed)
    step, rank = random_.randrange(1, STEPS * EPOCHS - 4), random_.randrange(2)
    folder, logs = tmp_path / "run", tmp_path / "logs"
    arguments = options(pictures(tmp_path_factory), folder, run__hang_timeout=ALLOWED)
    with started(torchrun(2, "--max-restarts=1", f"--log-dir={logs}", MAIN, *arguments), folder) as run:
        run.wait_for_step(step)
        print(f"after step {step}: SIGSTOP to the loaders of rank {rank}")
        for pid in children(trainer(run, rank)):
            os.kill(pid, signal.SIGSTOP)
        since = time.monotonic()
        for other in range(2):
            run.wait(
                lambda of=other: "Thread 0x" in stacks(folder, attempt=1, rank=of), f"stacks of rank {other}"
            )
        print(f"all stacks after {time.monotonic() - since:.1f} s; step {saved_step(folder)} is saved")
        run.end(code=0)

    assert [record["state"] for record in attempts(folder)] == ["failed", "done"]
    require_each_once(folder)
    assert_equal_runs(folder, whole_run(tmp_path_factory, 2))

    failure = first_failure(logs, host=socket.gethostname(), restart_dir=restart_dirs(logs)[0])
    assert failure.rank == rank, "not the one that waited for it"
    said = rf"Hang: no step for {ALLOWED} s, .*called from \w+ \(trainer/\w+\.py:\d+\); stacks in (.*)"
    found = re.fullmatch(said, failure.error)
    assert found is not None, failure.error
    assert Path(found[1]).read_text() == stacks(folder, attempt=1, rank=rank)
    waited = stacks(folder, attempt=1, rank=1 - rank)
    assert f"rank {1 - rank} of 2" in waited
    assert "waiting for the other ranks" in waited
    assert len(list((folder / "hangs").iterdir())) == 2, "the second attempt has left none"
