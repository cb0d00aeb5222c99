"""A rank that hangs: it is noticed in the time allowed, all stacks are written, and the restarted run ends equal."""

import os
import random
import re
import signal
import socket
from pathlib import Path

import pytest

from launch.failures import first_failure, restart_dirs
from tests import runs
from tests.launching import MAIN, torchrun

HANG_TIMEOUT = 12
"""Seconds: more than any step takes on a busy machine, the first one included."""


def trainer(run: runs.Run, rank: int) -> int:
    """Return the process id of a rank."""
    (pid,) = (pid for pid in run.trainers() if f"RANK={rank}" in Path(f"/proc/{pid}/environ").read_text().split("\0"))
    return pid


def stacks(folder: Path, rank: int) -> str:
    path = folder / "hangs" / f"0001-rank-{rank}.txt"
    return path.read_text() if path.exists() else ""


@pytest.mark.slow
def test_a_rank_whose_loader_hangs_is_reported_and_the_run_restarted(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    print(f"seed {(seed := random.randrange(1 << 30))}")
    random_ = random.Random(seed)
    step, rank = random_.randrange(1, runs.STEPS * runs.EPOCHS - 4), random_.randrange(2)
    folder, logs = tmp_path / "run", tmp_path / "logs"
    changes = runs.ALL_FEATURES | {"run__hang_timeout": HANG_TIMEOUT}
    arguments = runs.options(tmp_path_factory, folder, **changes)
    with runs.start(torchrun(2, "--max-restarts=1", f"--log-dir={logs}", MAIN, *arguments), folder) as run:
        run.wait_for_step(step)
        for pid in runs.children(trainer(run, rank)):
            os.kill(pid, signal.SIGSTOP)
        run.wait(lambda: all("Thread 0x" in stacks(folder, other) for other in range(2)), "stacks of both ranks")
        run.end(code=0)

    assert [record["state"] for record in runs.attempts(folder)] == ["failed", "done"]
    runs.assert_each_example_once(folder)
    runs.assert_equal(folder, runs.uninterrupted(tmp_path_factory, 2, **runs.ALL_FEATURES))

    failure = first_failure(logs, host=socket.gethostname(), restart_dir=restart_dirs(logs)[0])
    assert failure.rank == rank, "the rank that waited for it is reported instead"
    message = rf"Hang: no step for {HANG_TIMEOUT} s, .*called from \w+ \(\w+/\w+\.py:\d+\); stacks in (.*)"
    match = re.fullmatch(message, failure.error)
    assert match is not None, failure.error
    assert Path(match[1]).read_text() == stacks(folder, rank)
    assert f"rank {1 - rank} of 2" in stacks(folder, 1 - rank)
    assert "waiting for the other ranks" in stacks(folder, 1 - rank)
    assert len(list((folder / "hangs").iterdir())) == 2, "the second attempt left a file"
