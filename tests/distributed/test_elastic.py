"""Elastic training: two torchrun agents, as on two machines; one loses a process, and then is gone."""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.kills import (
    ALL_FEATURES,
    WORLD_SIZE_INDEPENDENT,
    assert_close_runs,
    assert_each_example_once,
    attempts,
    is_training,
    last_step,
    make_images,
    options,
    start_run,
    uninterrupted_run,
    world_sizes,
)
from tests.launching import MAIN, free_port


def agent(port: int, *, is_host: bool, arguments: list[str]) -> list[str]:
    """Return the command of one of 1 to 2 machines, with one process each."""
    settings = f"is_host={is_host},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3"
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launcher += [f"--rdzv-endpoint=127.0.0.1:{port}", f"--rdzv-id=test-{port}", f"--rdzv-conf={settings}"]
    launcher += ["--local-addr=127.0.0.1", str(MAIN), *arguments]
    return [sys.executable, "-m", "torch.distributed.run", *launcher]


@pytest.mark.slow
def test_training_survives_a_lost_process_and_a_lost_machine(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, port = tmp_path / "run", free_port()
    changes = ALL_FEATURES | WORLD_SIZE_INDEPENDENT
    arguments = options(make_images(tmp_path_factory), folder, **changes)
    with (
        start_run(agent(port, is_host=True, arguments=arguments), folder) as host,
        start_run(agent(port, is_host=False, arguments=arguments), folder) as guest,
    ):
        host.wait(
            lambda: is_training(folder, world_size=2, after=0) and last_step(folder) >= 3, "two processes"
        )
        number = len(attempts(folder))
        (victim,) = guest.trainers()
        os.kill(victim, signal.SIGKILL)
        host.wait(lambda: is_training(folder, world_size=2, after=number), "two processes again")

        host.wait(lambda: last_step(folder) >= 9, "step 9")
        number = len(attempts(folder))
        for pid in guest.alive():
            os.kill(pid, signal.SIGKILL)
        host.wait(lambda: is_training(folder, world_size=1, after=number), "one process")
        host.end(code=0)
    assert attempts(folder)[-1]["state"] == "done"
    assert set(world_sizes(folder)) == {1, 2}
    assert_each_example_once(folder)
    assert_close_runs(folder, uninterrupted_run(tmp_path_factory, "python", **changes))
