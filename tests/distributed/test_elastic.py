"""Elastic training: two torchrun agents, as on two machines; one loses a process, and then is gone."""

import os
import signal
from pathlib import Path

import pytest

from tests import runs
from tests.launching import free_port


@pytest.mark.slow
def test_training_survives_a_lost_process_and_a_lost_machine(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, endpoint = tmp_path / "run", f"127.0.0.1:{free_port()}"
    changes = runs.ALL_FEATURES | runs.WORLD_SIZE_INDEPENDENT
    arguments = runs.options(tmp_path_factory, folder, **changes)
    host_command, guest_command = (
        runs.elastic_agent("127.0.0.1", endpoint, arguments, is_host=is_host) for is_host in (True, False)
    )
    with runs.start(host_command, folder) as host, runs.start(guest_command, folder) as guest:
        host.wait(
            lambda: runs.is_training(folder, world_size=2, after=0) and runs.last_step(folder) >= 3, "two processes"
        )
        number = len(runs.attempts(folder))
        (victim,) = guest.trainers()
        os.kill(victim, signal.SIGKILL)
        host.wait(lambda: runs.is_training(folder, world_size=2, after=number), "two processes again")

        host.wait(lambda: runs.last_step(folder) >= 9, "step 9")
        number = len(runs.attempts(folder))
        for pid in guest.alive():
            os.kill(pid, signal.SIGKILL)
        host.wait(lambda: runs.is_training(folder, world_size=1, after=number), "one process")
        host.end(code=0)
    assert runs.attempts(folder)[-1]["state"] == "done"
    assert set(runs.world_sizes(folder)) == {1, 2}
    runs.assert_each_example_once(folder)
    runs.assert_close(folder, runs.uninterrupted(tmp_path_factory, "python", **changes))
