"""Worker processes of a data loader: how they start and end, and the shared memory that their batches need."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from typing import NoReturn

from regraft.parent_death import signal_on_parent_death
from regraft.startup_signals import STOP_SIGNALS
from trainer.errors import UserError

PREFETCH_FACTOR = 4
"""Batches that each worker keeps ready."""
SHARED_MEMORY = "/dev/shm"  # noqa: S108 (a file system, in which torch creates files with random names)
_OUT_OF_SHARED_MEMORY = 28  # exit code of a worker: ENOSPC


def init_worker(_: int, *, low_priority: bool) -> None:
    """Set up a worker process: signals, its end with the trainer, and its end if it cannot send a batch."""
    for number in STOP_SIGNALS:  # sent to whole process groups; the trainer handles them
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_exit_on_sigterm, args=(os.getppid(),), daemon=True).start()
    signal_on_parent_death(signal.SIGKILL)
    # Batches are sent by a thread. By default it prints an error and drops the batch, for which the trainer waits.
    Queue._on_queue_feeder_error = staticmethod(_exit_on_failed_send)  # type: ignore[attr-defined]
    if low_priority:
        os.nice(19)


def _exit_on_sigterm(trainer: int) -> None:
    """Exit at a SIGTERM from the trainer. Python sends it to its workers when it exits, and waits for them."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != trainer:
        pass
    os._exit(0)


def _end_workers() -> None:
    """End the daemonic processes as Python does when it exits, but kill those that do not end.

    A thread that libtorch starts in a worker before `init_worker` does not block SIGTERM. If it takes the signal,
    which is ignored, `_exit_on_sigterm` never sees it, and Python would wait forever.
    """
    workers = [process for process in multiprocessing.active_children() if process.daemon]
    for worker in workers:
        worker.terminate()
    for worker in workers:
        worker.join(timeout=1)
        worker.kill()


Finalize(None, _end_workers, exitpriority=0)  # before Python ends them


def _exit_on_failed_send(error: Exception, _: object) -> NoReturn:
    if "shared memory" in str(error) or "No space left on device" in str(error):
        os._exit(_OUT_OF_SHARED_MEMORY)
    traceback.print_exception(error)
    os._exit(1)


@contextmanager
def full_shared_memory_as_user_error() -> Iterator[None]:
    """Raise a UserError if a worker dies in the block since shared memory is full.

    torch raises a RuntimeError for a dead worker, wherever the trainer is. Other causes may be gone after a restart.
    """
    try:
        try:
            yield
        except (ConnectionError, EOFError) as error:
            if _is_from_worker(error):
                time.sleep(1)  # torch's report follows, from its handler of SIGCHLD
            raise
    except RuntimeError as error:  # also from the handler of SIGCHLD while the block above runs
        _raise_if_full(f"{error}; {error.__cause__}")  # the cause has the exit code or the signal
        raise


def _is_from_worker(error: BaseException) -> bool:
    """Return whether an error was raised while a tensor was received from a worker."""
    frames = (frame.f_globals.get("__name__") for frame, _ in traceback.walk_tb(error.__traceback__))
    return "torch.multiprocessing.reductions" in frames or "in pin memory thread" in str(error)


def _raise_if_full(text: str) -> None:
    """Raise a UserError if torch's report of an error says that shared memory is full."""
    is_death = text.startswith("DataLoader worker (pid")
    is_full = f"exit code {_OUT_OF_SHARED_MEMORY}" in text or "Bus error" in text
    if (is_death and is_full) or "allocate shared memory" in text:
        raise UserError(
            f"{SHARED_MEMORY} is full: the worker processes (data.num_workers) send their batches through it. "
            f"{_remedy(8)}"
        ) from None


def check_shared_memory(*, num_workers: int, processes: int, batch_bytes: int) -> None:
    """Check that the batches which all workers of this machine keep ready fit into its shared memory.

    Args:
        num_workers: worker processes of each training process.
        processes: training processes on this machine.
        batch_bytes: size of the batches that a worker prepares at a time: one of training and one of evaluation.

    Raises:
        UserError: they do not fit.

    """
    try:
        status = os.statvfs(SHARED_MEMORY)
    except OSError:  # without /dev/shm, torch uses another folder
        return
    # One more batch is in use by each training process.
    need = processes * (num_workers * PREFETCH_FACTOR + 1) * batch_bytes if num_workers else 0
    free = status.f_bavail * status.f_frsize
    if need > free and status.f_blocks:  # a tmpfs without a limit has 0 blocks
        raise UserError(
            f"data.num_workers: the batches of {processes * num_workers} worker processes need {_in_mb(need)} of "
            f"shared memory, but {SHARED_MEMORY} has {_in_mb(free)} free. {_remedy(1 + need // 10**9)}"
        )


def _remedy(gigabytes: int) -> str:
    return (
        f"Give the container more shared memory (docker run --shm-size {gigabytes}g, or --ipc=host), or decode in the "
        "training process (--data.num_workers 0)"
    )


def _in_mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"
