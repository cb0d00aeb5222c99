import os
import signal
import socket
import threading
from collections.abc import Collection
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from tests.launching import free_port
from trainer.distributed.launch_checks import read_process_group
from trainer.distributed.rendezvous import Wait, join_process_group, rendezvous_nonce
from trainer.distributed.signals import Stopped, StopSignals
from trainer.errors import UserError


def start(store: HashStore, world_size: int, *, ranks: Collection[int], timeout: float = 10) -> dict[int, str]:
    """Return the nonce, or the error, of each rank that takes part in a start."""
    results: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            results[rank] = rendezvous_nonce(store, rank, world_size, wait=Wait(timedelta(seconds=timeout)))
        except UserError as error:
            results[rank] = str(error)

    threads = [threading.Thread(target=join, args=(rank,)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_each_start_has_a_nonce_of_its_own_in_the_same_store() -> None:
    store, nonces = HashStore(), set()
    for world_size in (3, 2, 4, 1, 3):
        results = start(store, world_size, ranks=range(world_size))
        assert sorted(results) == list(range(world_size))
        (nonce,) = set(results.values())
        assert "process group" not in nonce
        nonces.add(nonce)
    assert len(nonces) == 5


@pytest.mark.parametrize(("ranks", "missing"), [((1, 2), 0), ((0, 1), 2)])
def test_a_missing_rank_is_not_replaced_by_an_earlier_start(ranks: tuple[int, int], missing: int) -> None:
    store = HashStore()
    start(store, 3, ranks=range(3))
    results = start(store, 3, ranks=ranks, timeout=0.3)
    timed_out = [rank for rank in ranks if f"rank {missing} has not joined" in results[rank]]
    # Without rank 0 no rank has a nonce; rank 0 itself waits for all ranks.
    assert timed_out == ([1, 2] if missing == 0 else [0])


def join(monkeypatch: pytest.MonkeyPatch, seconds: float, **variables: str) -> None:
    """Join the process group that variables of a launcher that has ended describe."""
    group = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**group, "MASTER_PORT": str(free_port()), **variables}.items():
        monkeypatch.setenv(name, value)
    join_process_group(
        read_process_group(os.environ), "gloo", timeout=timedelta(hours=2), join_timeout=timedelta(seconds=seconds)
    )


@pytest.mark.parametrize(("rank", "missing"), [("0", "the other processes"), ("1", "rank 0")])
def test_a_process_without_its_group_says_so_and_ends_at_a_signal_or_after_a_time(
    rank: str, missing: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    threading.Timer(1.0, os.kill, [os.getpid(), signal.SIGTERM]).start()
    with StopSignals(), pytest.raises(Stopped):
        join(monkeypatch, 60, RANK=rank)
    assert f"waiting for {missing} for up to 60 s (WORLD_SIZE=2, RANK={rank}, LOCAL_RANK=0" in capfd.readouterr().err
    with pytest.raises(UserError, match=rf"^{missing} has not joined the process group within 0 s: .*RANK={rank}"):
        join(monkeypatch, 0.2, RANK=rank)


def test_a_group_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"MASTER_ADDR is 'no-such-host.invalid', which cannot be resolved"):
        join(monkeypatch, 60, MASTER_ADDR="no-such-host.invalid")
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        with pytest.raises(UserError, match=r"rank 0 cannot meet the other processes .* address already in use"):
            join(monkeypatch, 60, MASTER_PORT=str(listener.getsockname()[1]))
