"""A name in common: of all processes of one start, and of no other."""

import threading
from collections.abc import Collection
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from trainer.distributed.rendezvous import rendezvous_nonce
from trainer.errors import UserError


def names(
    store: HashStore, world_size: int, *, present: Collection[int], patience: float = 10
) -> dict[int, str]:
    """Return what each process of a start takes for its name, or hears because it has waited in vain."""
    found: dict[int, str] = {}

    def join(rank: int) -> None:
        try:
            found[rank] = rendezvous_nonce(store, rank, world_size, patience=timedelta(seconds=patience))
        except UserError as error:
            found[rank] = str(error)

    processes = [threading.Thread(target=join, args=(rank,)) for rank in present]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    return found


def test_a_start_has_one_name_and_the_next_another_whoever_was_in_the_store() -> None:
    store, seen = HashStore(), set()
    for world_size in (3, 2, 4, 1, 3):
        found = names(store, world_size, present=range(world_size))
        assert sorted(found) == list(range(world_size))
        (name,) = set(found.values())
        assert "process group" not in name
        seen.add(name)
    assert len(seen) == 5


@pytest.mark.parametrize(("present", "missing"), [((1, 2), 0), ((0, 1), 2)])
def test_nobody_goes_on_with_a_partner_who_is_only_remembered(present: tuple[int, int], missing: int) -> None:
    store = HashStore()
    names(store, 3, present=range(3))
    found = names(store, 3, present=present, patience=0.3)
    waiting = [rank for rank in present if f"rank {missing} has not come" in found[rank]]
    # Without rank 0 nobody has a name; rank 0 itself waits for all.
    assert waiting == ([1, 2] if missing == 0 else [0])
