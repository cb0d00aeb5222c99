import threading
from collections.abc import Collection
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from trainer.distributed.rendezvous import rendezvous_nonce
from trainer.errors import UserError


def start(store: HashStore, world_size: int, *, ranks: Collection[int], timeout: float = 10) -> dict[int, str]:
    """Return the nonce, or the error, of each rank that takes part in a start."""
    results: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            results[rank] = rendezvous_nonce(store, rank, world_size, timeout=timedelta(seconds=timeout))
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
