"""Join the process group of a launcher, without the addresses of processes that have ended.

torchrun keeps one store through all its restarts. The addresses of earlier processes stay in it, and torch reads
whichever comes first. A restarted group then fails with refused connections, or waits for processes that are gone
(torch 2.14; pytorch issue 135712 describes an earlier form). No number that torchrun passes on is both new and the same
on all ranks; each agent counts its restarts for itself. So the ranks agree on a nonce first: each rank sends a random
id that was never used, and only a living rank 0 can answer it. The nonce is the prefix of the group's keys.
"""

import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import Any, Literal

import torch
from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

from trainer.distributed.process_group import ProcessGroup
from trainer.errors import UserError
from trainer.text import escape_unprintable

JOIN_TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the other processes of its start."""
QUIET_SECONDS = 20.0
"""Processes of a launcher start at slightly different times, which is not worth a message."""
_POLL_SECONDS = 0.05


def join_process_group(
    group: ProcessGroup | None,
    backend: Literal["gloo", "nccl"],
    *,
    timeout: timedelta,
    join_timeout: timedelta = JOIN_TIMEOUT,
    quiet_seconds: float = 0.0,
) -> None:
    """Join a process group, unless this process has joined it already. Signals are handled while it waits.

    Args:
        group: the process group that the environment describes; None for a process that trains alone.
        backend: backend of the collectives.
        timeout: timeout of the collectives.
        join_timeout: how long to wait for the other processes.
        quiet_seconds: how long to wait without a message.

    Raises:
        UserError: the other processes cannot be reached, or did not join in time.

    """
    if group is None or torch.distributed.is_initialized():
        return
    wait = Wait(join_timeout, group, quiet_seconds=quiet_seconds)
    store = _open_store(group, join_timeout, wait)
    torch.distributed.init_process_group(
        backend,
        store=PrefixStore(rendezvous_nonce(store, group.rank, group.world_size, wait=wait), store),
        rank=group.rank,
        world_size=group.world_size,
        timeout=timeout,
    )


class Wait:
    """Waits for other processes in short sleeps: says once what for, and raises a UserError after the timeout."""

    def __init__(self, timeout: timedelta, group: ProcessGroup | None = None, *, quiet_seconds: float = 0.0) -> None:
        self._timeout, self._group, self._quiet_seconds = timeout.total_seconds(), group, quiet_seconds
        self._began = time.monotonic()
        self._is_announced = group is None

    def sleep(self, missing: str) -> None:
        """Sleep for one poll interval, while `missing` has not joined.

        Raises:
            UserError: the timeout has passed.

        """
        seconds = time.monotonic() - self._began
        if seconds > self._timeout:
            raise UserError(
                f"{missing} has not joined the process group within {self._timeout:.0f} s: expected WORLD_SIZE "
                f"processes{self._describe()}. Check that each of them was started, and whether one has failed"
            )
        if not self._is_announced and seconds >= self._quiet_seconds:
            self._is_announced = True
            message = (
                f"waiting for {missing} for up to {self._timeout:.0f} s{self._describe()}. If no launcher has set "
                "these variables for this start, end it and unset them"
            )
            with suppress(OSError, ValueError):  # standard error may be closed
                print(message, file=sys.stderr, flush=True)
        time.sleep(_POLL_SECONDS)

    def _describe(self) -> str:
        return f" ({self._group.description})" if self._group is not None else ""


def _open_store(group: ProcessGroup, timeout: timedelta, wait: Wait) -> Any:
    """Return the store at MASTER_ADDR and MASTER_PORT, which rank 0 or its launcher serves.

    torch opens it in C++, where no signal is handled, so a thread does it.
    """
    results: list[Any] = []

    def connect() -> None:
        try:
            socket.getaddrinfo(group.address, group.port)
            # Longer than the wait below, whose message says what to do.
            results.append(next(rendezvous("env://", timeout=timeout + timedelta(seconds=30)))[0])
        except Exception as error:  # noqa: BLE001 (raised below)
            results.append(error)

    _wait_for_thread(connect, lambda: wait.sleep("the other processes" if group.rank == 0 else "rank 0"))
    (result,) = results
    if isinstance(result, socket.gaierror):
        raise UserError(
            f"MASTER_ADDR is {escape_unprintable(group.address)!r}, which cannot be resolved on this machine "
            f"({result.strerror}): expected the host of rank 0. Start the processes with torchrun, or unset the "
            f"variables of an earlier start ({group.description})"
        )
    if isinstance(result, torch.distributed.DistError):
        raise UserError(
            f"rank {group.rank} cannot meet the other processes ({group.description}): {str(result).splitlines()[0]}. "
            "Start the processes with torchrun, or unset the variables of an earlier start"
        )
    if isinstance(result, Exception):
        raise result
    return result


def _wait_for_thread(function: Callable[[], None], sleep: Callable[[], None]) -> None:
    thread = threading.Thread(target=function, name="rendezvous", daemon=True)
    thread.start()
    while thread.is_alive():
        sleep()


def rendezvous_nonce(store: Any, rank: int, world_size: int, *, wait: Wait) -> str:
    """Return a random id that all processes of this start share, and no other start has.

    Args:
        store: a torch.distributed.Store. It may hold keys of an earlier start.
        rank: rank of this process.
        world_size: number of processes.
        wait: waits for the other processes.

    Raises:
        UserError: a process did not join in time.

    """
    own_id = secrets.token_hex(8)
    if rank > 0:
        store.set(f"regraft/request/{rank}", own_id)
        while not store.check([f"regraft/reply/{own_id}"]):
            wait.sleep("rank 0")
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
            wait.sleep(f"rank {', '.join(map(str, sorted(missing)))}")
    return own_id
