"""Elastic training on two machines: one loses a process, and then its network, without a word to either side.

Both sides notice, and the one with the rendezvous goes on.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests import runs
from tests.distributed.networks import DEVICE, Host, two_hosts
from tests.launching import MAIN

PORT = 29400
HANG_TIMEOUT = 12


def agent(host: Host, head: Host, arguments: list[str]) -> list[str]:
    """Return the command that trains with one process on a host; the head serves the rendezvous."""
    is_host, endpoint = host is head, f"{head.address}:{PORT}"
    settings = f"is_host={is_host},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=15"
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d", "--rdzv-id=elastic"]
    launcher += [f"--rdzv-endpoint={endpoint}", f"--rdzv-conf={settings}", f"--local-addr={host.address}"]
    return host.command(sys.executable, "-m", "torch.distributed.run", *launcher, str(MAIN), *arguments)


def ranks_with_stacks(folder: Path, attempt: int) -> int:
    """Return how many ranks of an attempt have written their stacks."""
    return sum("Thread 0x" in path.read_text() for path in (folder / "hangs").glob(f"{attempt:04}-*.txt"))


@pytest.mark.parametrize(
    ("head", "loss"),
    [pytest.param(0, "killed", marks=pytest.mark.soak), pytest.param(1, "cut", marks=pytest.mark.slow)],
)
def test_training_survives_a_lost_process_and_a_lost_machine(
    head: int, loss: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 0, which writes, is on the first host; with `head` 1 it is on the one that is lost."""
    folder, changes = tmp_path / "run", runs.ALL_FEATURES | runs.WORLD_SIZE_INDEPENDENT
    arguments = runs.options(tmp_path_factory, folder, **changes, run__hang_timeout=HANG_TIMEOUT)
    environment = {**runs.ON_CPU, "GLOO_SOCKET_IFNAME": DEVICE}
    with two_hosts() as hosts:
        stays, goes = hosts[head], hosts[1 - head]
        goes.limit_tcp_retries(6)  # 25 s
        with (
            runs.start(agent(stays, stays, arguments), folder, environment=environment) as here,
            runs.start(agent(goes, stays, arguments), folder, environment=environment) as there,
        ):

            def wait_for_two(step: int, *, after: int = 0) -> int:
                """Wait until an attempt later than `after` trains on two processes, and return the latest one."""
                here.wait(lambda: runs.is_training(folder, world_size=2, after=after), "two processes")
                here.wait(lambda: runs.last_step(folder) >= step, f"step {step}")
                return len(runs.attempts(folder))

            attempt = wait_for_two(3)
            (victim,) = there.trainers()
            os.kill(victim, signal.SIGKILL)
            attempt = wait_for_two(9, after=attempt)
            if loss == "killed":  # connections are reset
                for pid in there.alive():
                    os.kill(pid, signal.SIGKILL)
            else:
                goes.cut()
                here.wait(lambda: ranks_with_stacks(folder, attempt) == 2, "stacks of both ranks")
                there.wait(lambda: len(there.alive()) <= 1, "none but torchrun where the cable is cut")
            here.wait(lambda: runs.is_training(folder, world_size=1, after=attempt), "one process again")
            there.end(code=-signal.SIGKILL if loss == "killed" else 1)
            here.end(code=0)
    *_, lost, last = runs.attempts(folder)
    assert (lost["attempt"], last["state"]) == (attempt, "done")
    if loss == "cut":
        assert lost["state"] == "failed"
        assert "no step for" in lost["reason"]
    assert set(runs.world_sizes(folder)) == {1, 2}, "the side that is cut off must not train on its own"
    runs.assert_each_example_once(folder)
    runs.assert_close(folder, runs.uninterrupted(tmp_path_factory, "python", **changes))
