"""A network that is cut without a word to either side: both notice, and the side with the rendezvous goes on."""

from pathlib import Path

import pytest

from tests import runs
from tests.distributed.networks import DEVICE, Host, two_hosts

PORT = 29400
HANG_TIMEOUT = 12


def agent(host: Host, head: Host, arguments: list[str]) -> list[str]:
    """Return the command that trains on a host; the head serves the rendezvous."""
    endpoint = f"{head.address}:{PORT}"
    return host.command(*runs.elastic_agent(host.address, endpoint, arguments, is_host=host is head))


def ranks_with_stacks(folder: Path) -> int:
    """Return how many ranks of the first attempt have written their stacks."""
    return sum("Thread 0x" in path.read_text() for path in (folder / "hangs").glob("0001-*.txt"))


@pytest.mark.parametrize("head", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.slow)])
def test_the_side_with_the_rendezvous_goes_on_and_the_other_ends(
    head: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 0, which writes, is on the first host; with `head` 1 it is the one that is cut off."""
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
            here.wait(
                lambda: runs.is_training(folder, world_size=2, after=0) and runs.last_step(folder) >= 5, "two processes"
            )
            goes.cut()
            here.wait(lambda: ranks_with_stacks(folder) == 2, "stacks of both ranks")
            there.wait(lambda: len(there.alive()) <= 1, "none but torchrun where the cable is cut")
            here.wait(lambda: runs.is_training(folder, world_size=1, after=1), "one process again")
            there.end(code=1)
            here.end(code=0)
    assert [record["state"] for record in runs.attempts(folder)] == ["failed", "done"]
    assert "no step for" in runs.attempts(folder)[0]["reason"]
    assert set(runs.world_sizes(folder)) == {1, 2}, "the side that is cut off must not train on its own"
    runs.assert_each_example_once(folder)
    runs.assert_close(folder, runs.uninterrupted(tmp_path_factory, "python", **changes))
