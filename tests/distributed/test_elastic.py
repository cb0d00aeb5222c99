"""Elastic training: two agents of torchrun, as on two machines, of which one loses a process and then is gone."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.kills import (
    SAME_ANYWHERE,
    Run,
    attempts,
    last_step,
    options,
    pictures,
    require_close,
    require_each_once,
    saved_step,
    started,
    whole_run,
    worlds,
)
from tests.launching import MAIN, free_port

EPOCHS = 4
LOSSES, WEIGHTS = 1e-5, 1e-5
"""Measured: 2e-6 of a loss, 3e-7 in a weight."""


def agent(port: int, *, is_host: bool, arguments: list[str]) -> list[str]:
    """Return the command of one machine: 1 to 2 of them, of one process each."""
    settings = {
        "is_host": is_host,
        "last_call_timeout": 3,  # how long a group of one waits for a second
        "keep_alive_interval": 1,
        "keep_alive_max_attempt": 3,
    }
    listed = ",".join(f"{key}={value}" for key, value in settings.items())
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launcher += [
        f"--rdzv-endpoint=127.0.0.1:{port}",
        f"--rdzv-id=test-{port}",
        f"--rdzv-conf={listed}",
    ]
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        *launcher,
        "--local-addr=127.0.0.1",
        str(MAIN),
        *arguments,
    ]


def trained(folder: Path, *, world_size: int, after: int) -> bool:
    """Return whether so many processes, of an attempt later than `after`, have come to an update."""
    path = folder / "audit" / f"rank-{world_size - 1}.jsonl"
    lines = path.read_text(encoding="ascii").split("\n")[:-1] if path.exists() else []
    return any(row["world"] == world_size and row["attempt"] > after for row in map(json.loads, lines))


def came_back(run: Run, *, world_size: int, after: int, since: float) -> None:
    run.wait(
        lambda: trained(run.folder, world_size=world_size, after=after),
        f"{world_size} processes at work again",
    )
    print(
        f"{world_size} at work again after {time.monotonic() - since:.1f} s, from step {saved_step(run.folder)}",
        flush=True,
    )


@pytest.mark.slow
def test_a_machine_that_loses_a_process_and_then_is_gone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, port = tmp_path / "run", free_port()
    changes = {**SAME_ANYWHERE, "train__epochs": EPOCHS}
    arguments = options(pictures(tmp_path_factory), folder, **changes)
    with (
        started(agent(port, is_host=True, arguments=arguments), folder) as host,
        started(agent(port, is_host=False, arguments=arguments), folder) as guest,
    ):
        host.wait(lambda: trained(folder, world_size=2, after=0) and last_step(folder) >= 3, "two processes")

        (victim,) = guest.trainers()
        number = len(attempts(folder))
        print(f"step {last_step(folder)}: SIGKILL to the second machine's process {victim}")
        since = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        came_back(host, world_size=2, after=number, since=since)

        host.wait(lambda: last_step(folder) >= 12, "step 12")
        number = len(attempts(folder))
        print(f"step {last_step(folder)}: SIGKILL to all of the second machine's processes")
        since = time.monotonic()
        for pid in guest.alive():
            os.kill(pid, signal.SIGKILL)
        came_back(host, world_size=1, after=number, since=since)
        host.end(code=0)
    assert attempts(folder)[-1]["state"] == "done"
    found = worlds(folder)
    print(f"updates were made by {found.count(2)} x 2 and {found.count(1)} x 1 processes")
    assert set(found) == {1, 2}
    require_each_once(folder, epochs=EPOCHS)
    require_close(folder, whole_run(tmp_path_factory, "python", **changes), losses=LOSSES, weights=WEIGHTS)
