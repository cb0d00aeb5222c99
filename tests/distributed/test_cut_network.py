"""A network that is cut in mid-run, without a word to either side: noticed, and gone on with by the side that can."""

import sys
import time
from pathlib import Path

import pytest

from tests.distributed.networks import DEVICE, Host, two_hosts
from tests.distributed.test_elastic import LOSSES, WEIGHTS, trained
from tests.kills import (
    ON_CPU,
    SAME_ANYWHERE,
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
from tests.launching import MAIN

PORT = 29400
ALLOWED = 12
"""Seconds without a step; see test_hang."""


def agent(host: Host, head: Host, arguments: list[str]) -> list[str]:
    """Return the command of one machine: 1 to 2 of them, of one process each."""
    settings = {
        "is_host": host is head,
        "last_call_timeout": 3,
        "keep_alive_interval": 1,
        "keep_alive_max_attempt": 3,
        "read_timeout": 15,
    }
    listed = ",".join(f"{key}={value}" for key, value in settings.items())
    launcher = ["--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    launcher += [f"--rdzv-endpoint={head.address}:{PORT}", "--rdzv-id=cut", f"--rdzv-conf={listed}"]
    launcher += [f"--local-addr={host.address}", str(MAIN), *arguments]
    return host.command(sys.executable, "-m", "torch.distributed.run", *launcher)


def stacks(folder: Path) -> list[str]:
    """Return the ranks whose stacks the first attempt has written."""
    return sorted(
        path.name for path in (folder / "hangs").glob("0001-*.txt") if "Thread 0x" in path.read_text()
    )


@pytest.mark.parametrize(
    "head", [pytest.param(0, marks=pytest.mark.soak), pytest.param(1, marks=pytest.mark.slow)]
)
def test_the_side_with_the_rendezvous_goes_on_and_the_other_ends(
    head: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Rank 0, which writes, is on the first host: with `head` 1 it is the one that is cut off."""
    folder, changes = tmp_path / "run", {**SAME_ANYWHERE, "run__hang_timeout": ALLOWED}
    arguments = options(pictures(tmp_path_factory), folder, **changes)
    environment = {**ON_CPU, "GLOO_SOCKET_IFNAME": DEVICE}
    with two_hosts() as hosts:
        stays, goes = hosts[head], hosts[1 - head]
        goes.give_up_after(6)  # 25 s
        with (
            started(agent(stays, stays, arguments), folder, environment=environment) as here,
            started(agent(goes, stays, arguments), folder, environment=environment) as there,
        ):
            here.wait(
                lambda: trained(folder, world_size=2, after=0) and last_step(folder) >= 5, "two processes"
            )
            goes.cut()
            since = time.monotonic()

            def show(what: str) -> None:
                print(f"{time.monotonic() - since:.1f} s after the cut: {what}", flush=True)

            show(f"step {last_step(folder)} is made, {saved_step(folder)} saved")
            here.wait(lambda: len(stacks(folder)) == 2, "stacks of both ranks")
            show("both sides have noticed")
            there.wait(lambda: len(there.alive()) <= 1, "none but torchrun where the cable is cut")
            show("the trainer that is cut off has ended")
            here.wait(lambda: trained(folder, world_size=1, after=1), "one process at work again")
            show("the other side is at work again")
            there.end(code=1)
            show("no process is left where the cable is cut")
            here.end(code=0)
            show("the run is done")
    assert [record["state"] for record in attempts(folder)] == ["failed", "done"]
    assert "no step for" in attempts(folder)[0]["reason"]
    found = worlds(folder)
    assert set(found) == {1, 2}, "nothing of a world of its own that the side that is cut off has made"
    require_each_once(folder)
    whole = whole_run(tmp_path_factory, "python", **SAME_ANYWHERE)
    require_close(folder, whole, losses=LOSSES, weights=WEIGHTS)
