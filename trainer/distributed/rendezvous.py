"""Join the process group of a launcher, without the addresses of processes that have ended.

torchrun keeps one store through all its restarts. The addresses of earlier processes stay in it, and torch reads
whichever comes first. A restarted group then fails with refused connections, or waits for processes that are gone
(torch 2.14; pytorch issue 135712 describes an earlier form). No number that torchrun passes on is both new and the same
on all ranks; each agent counts its restarts for itself. So the ranks agree on a nonce first: each rank sends a random
id that was never used, and only a living rank 0 can answer it. The nonce is the prefix of the group's keys.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from trainer.errors import UserError

_POLL_SECONDS = 0.05


def join_process_group(environment: Mapping[str, str], backend: Literal["gloo", "nccl"], *, timeout: timedelta) -> None:
    """Join the process group that a launcher has started, unless this process is alone or has joined already.

    It polls in Python, so that signals are handled while it waits.
    """
    if environment.get("WORLD_SIZE", "1") == "1" or torch.distributed.is_initialized():
        return
    store, rank, world_size = next(rendezvous("env://", timeout=timeout))
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(rendezvous_nonce(store, rank, world_size, timeout=timeout), store),
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )


def rendezvous_nonce(store: Any, rank: int, world_size: int, *, timeout: timedelta) -> str:
    """Return a random id that all processes of this start share, and no other start has.

    Args:
        store: a torch.distributed.Store. It may hold keys of an earlier start.
        rank: rank of this process.
        world_size: number of processes.
        timeout: how long to wait for the other processes.

    Raises:
        UserError: a process did not join in time.

    """
    deadline = time.monotonic() + timeout.total_seconds()
    own_id = secrets.token_hex(8)
    if rank > 0:
        store.set(f"regraft/request/{rank}", own_id)
        while not store.check([f"regraft/reply/{own_id}"]):
            _sleep_until(deadline, missing=[0])
        nonce: str = store.get(f"regraft/reply/{own_id}").decode()
        store.set(f"regraft/received/{nonce}/{rank}", "")
        return nonce
    missing, answered = set(range(1, world_size)), set()
    while missing:
        for other in sorted(missing):
            key = f"regraft/request/{other}"
            # A restarted rank sends another id, which gets a reply of its own.
            if store.check([key]) and (request := store.get(key).decode()) not in answered:
                store.set(f"regraft/reply/{request}", own_id)
                answered.add(request)
            if store.check([f"regraft/received/{own_id}/{other}"]):
                missing.discard(other)
        if missing:
            _sleep_until(deadline, missing=sorted(missing))
    return own_id


def _sleep_until(deadline: float, *, missing: Sequence[int]) -> None:
    """Sleep for one poll interval; raise a UserError after the deadline."""
    if time.monotonic() > deadline:
        raise UserError(
            f"rank {', '.join(map(str, missing))} has not joined the process group: expected WORLD_SIZE processes. "
            "Check that each of them was started, and whether one has failed"
        )
    time.sleep(_POLL_SECONDS)
