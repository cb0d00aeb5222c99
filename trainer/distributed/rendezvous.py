"""How the processes of a start find one another, and nobody who is gone.

torchrun keeps one store through all its restarts. In it still stand the addresses of the processes before, and
torch reads whichever comes first: a restarted group then fails with refused connections, or waits for the dead
(torch 2.14; pytorch issue 135712 is of an earlier form of it). Neither the number of restarts, which each agent
counts for itself, nor anything else that torchrun tells is new and common to all. So they agree on a name first:
everyone asks with a number that was never used, which only a living rank 0 can answer.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from trainer.errors import UserError

_SECONDS_BETWEEN_LOOKS = 0.05


def join_process_group(
    environment: Mapping[str, str], backend: Literal["gloo", "nccl"], *, patience: timedelta
) -> None:
    """Join the process group that a launcher has started, unless this process is alone or has joined.

    Waits where Python sees signals, unlike torch's own waiting.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or torch.distributed.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://", timeout=patience))
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(rendezvous_nonce(store, rank, world_size, patience=patience), store),
        rank=rank,
        world_size=world_size,
        timeout=patience,
    )


def rendezvous_nonce(store: Any, rank: int, world_size: int, *, patience: timedelta) -> str:
    """Return a name that all processes of this start, and no others, have in common.

    Args:
        store: a torch.distributed.Store, which may hold what an earlier start has left.
        rank: of this process.
        world: number of processes.
        patience: how long the others are waited for.

    Raises:
        UserError: one of them does not come.

    """
    until = time.monotonic() + patience.total_seconds()
    mine = secrets.token_hex(8)
    if rank > 0:
        store.set(f"regraft/asks/{rank}", mine)
        while not store.check([f"regraft/answer/{mine}"]):
            _wait(until, [0])
        name: str = store.get(f"regraft/answer/{mine}").decode()
        store.set(f"regraft/heard/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, world_size)), set()
    while missing:
        for other in sorted(missing):
            asks, heard = f"regraft/asks/{other}", f"regraft/heard/{mine}/{other}"
            if store.check([asks]) and (asked := store.get(asks).decode()) not in answered:
                store.set(f"regraft/answer/{asked}", mine)
                answered.add(asked)
            if store.check([heard]):
                missing.discard(other)
        if missing:
            _wait(until, sorted(missing))
    return mine


def _wait(until: float, missing: Sequence[int]) -> None:
    if time.monotonic() > until:
        raise UserError(
            f"rank {', '.join(map(str, missing))} has not come to the process group: expected all processes that "
            "WORLD_SIZE tells of. See that each of them was started, and why it may have ended"
        )
    time.sleep(_SECONDS_BETWEEN_LOOKS)
