"""A network that is cut without a word to either side: both notice, and the side with the rendezvous goes on."""

import sys
from pathlib import Path

import pytest

from tests.distributed.networks import DEVICE, Host, two_hosts
from tests.kills import (
    ALL_FEATURES,
    ON_CPU,
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
from tests.launching import MAIN

PORT = 29400
HANG_TIMEOUT = 12


def agent(host: Host, head: Host, arguments: list[str]) -> list[str]:
    """Return the command of one of 1 to 2 machines, with one process each."""
    settings = f"is_host={host is head},last_call_timeout=3,keep_alive_interval=1,keep_alive_max_attempt=3,read_timeout=15"
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launcher += [f"--rdzv-endpoint={head.address}:{PORT}", "--rdzv-id=cut", f"--rdzv-conf={settings}"]
    launcher += [f"--local-addr={host.address}", str(MAIN), *arguments]
    return host.command(sys.executable, "-m", "torch.distributed.run", *launcher)


def ranks_with_stacks(folder: Path) -> int:
    """Return how many ranks of the first attempt have written their stacks."""
    return sum("Thread 0x" in path.read_text() for path in (folder / "hangs").glob("0001-*.txt"))


@pytest.mark.parametrize(
    "head", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.slow)]
)
def test_the_side_with_the_rendezvous_goes_on_and_the_other_ends(
    head: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 0, which writes, is on the first host; with `head` 1 it is the one that is cut off."""
    folder, changes = tmp_path / "run", ALL_FEATURES | WORLD_SIZE_INDEPENDENT
    arguments = options(make_images(tmp_path_factory), folder, **changes, run__hang_timeout=HANG_TIMEOUT)
    environment = {**ON_CPU, "GLOO_SOCKET_IFNAME": DEVICE}
    with two_hosts() as hosts:
        stays, goes = hosts[head], hosts[1 - head]
        goes.limit_tcp_retries(6)  # 25 s
        with (
            start_run(agent(stays, stays, arguments), folder, environment=environment) as here,
            start_run(agent(goes, stays, arguments), folder, environment=environment) as there,
        ):
            here.wait(
                lambda: is_training(folder, world_size=2, after=0) and last_step(folder) >= 5, "two processes"
            )
            goes.cut()
            here.wait(lambda: ranks_with_stacks(folder) == 2, "stacks of both ranks")
            there.wait(lambda: len(there.alive()) <= 1, "none but torchrun where the cable is cut")
            here.wait(lambda: is_training(folder, world_size=1, after=1), "one process again")
            there.end(code=1)
            here.end(code=0)
    assert [record["state"] for record in attempts(folder)] == ["failed", "done"]
    assert "no step for" in attempts(folder)[0]["reason"]
    assert set(world_sizes(folder)) == {1, 2}, "the side that is cut off must not train on its own"
    assert_each_example_once(folder)
    assert_close_runs(folder, uninterrupted_run(tmp_path_factory, "python", **changes))
