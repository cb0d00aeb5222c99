import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from tests.disks import disk, with_small_shared_memory
from trainer.data import workers
from trainer.data.workers import check_shared_memory, full_shared_memory_as_user_error, init_worker
from trainer.distributed.signals import STOP_SIGNALS
from trainer.errors import UserError

COUNT = 33


class Zeros(Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return COUNT

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(100)


@pytest.fixture
def started() -> tuple[Iterator[torch.Tensor], BaseProcess]:
    """Return the batches of a loader after the first one, and its worker."""
    others = {child.pid for child in multiprocessing.active_children()}  # of earlier tests
    batches = iter(DataLoader(Zeros(), num_workers=1, worker_init_fn=lambda _: init_worker(_, low_priority=True)))
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child.pid not in others)
    return batches, worker


def test_a_worker_ignores_stop_signals_and_ends_with_its_trainer(
    started: tuple[Iterator[torch.Tensor], BaseProcess],
) -> None:
    batches, worker = started
    for number in STOP_SIGNALS:  # from another process, as if sent to the whole group
        subprocess.run(["kill", f"-{number.name.removeprefix('SIG')}", str(worker.pid)], check=True)
    assert sum(1 for _ in batches) == COUNT - 1  # the loader raises if its worker has ended
    worker.terminate()
    worker.join(timeout=30)
    assert worker.exitcode == 0


EXIT_WITH_A_WORKER_THAT_MISSES_SIGTERM = """
import multiprocessing, signal, time
import trainer.data.workers

def work(started):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    started.set()
    time.sleep(60)

started = multiprocessing.Event()
multiprocessing.Process(target=work, args=(started,), daemon=True).start()
started.wait()
"""


def test_a_worker_that_misses_its_signal_does_not_keep_python_from_its_exit(repository: Path) -> None:
    program = [sys.executable, "-c", EXIT_WITH_A_WORKER_THAT_MISSES_SIGTERM]
    subprocess.run(program, cwd=repository, check=True, timeout=20)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("number", "error", "message"),
    [
        (signal.SIGBUS, UserError, "/dev/shm is full: .*docker run --shm-size 8g.*--data.num_workers 0"),
        (signal.SIGKILL, RuntimeError, r"DataLoader worker \(pid"),  # launchers restart the run
    ],
)
def test_a_dead_worker_ends_the_run(
    number: signal.Signals, error: type[Exception], message: str, started: tuple[Iterator[torch.Tensor], BaseProcess]
) -> None:
    batches, worker = started
    os.kill(worker.pid or 0, number)

    def wait() -> None:
        list(batches)
        time.sleep(9)  # it had sent all of its batches: torch's handler of SIGCHLD raises the error

    with pytest.raises(error, match=message), full_shared_memory_as_user_error():
        wait()


def test_a_report_that_arrives_while_another_error_is_handled_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(error: BaseException) -> bool:
        raise RuntimeError("DataLoader worker (pid 1) is killed by signal: Bus error.") from error

    monkeypatch.setattr(workers, "_is_from_worker", interrupted)
    with pytest.raises(UserError, match="is full"), full_shared_memory_as_user_error():
        raise ConnectionResetError


def test_other_errors_are_not_changed() -> None:
    for error, expected in (
        (RuntimeError("something else"), RuntimeError),
        (ConnectionResetError("of a download"), ConnectionResetError),
        (RuntimeError("Caught RuntimeError in DataLoader worker: unable to allocate shared memory(shm)"), UserError),
    ):
        with pytest.raises(expected), full_shared_memory_as_user_error():  # type: ignore[arg-type]
            raise error


def test_batches_that_do_not_fit_into_shared_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with disk(tmp_path / "shm", "20m") as folder:
        monkeypatch.setattr(workers, "SHARED_MEMORY", str(folder))
        check_shared_memory(num_workers=2, processes=1, batch_bytes=2_000_000)  # 18 MB
        check_shared_memory(num_workers=0, processes=9, batch_bytes=9_000_000)
        text = re.escape(f"the batches of 4 worker processes need 36 MB of shared memory, but {folder} has 21 MB free")
        with pytest.raises(UserError, match=rf"^data\.num_workers: {text}\. .*--shm-size 1g.*--data\.num_workers 0"):
            check_shared_memory(num_workers=2, processes=2, batch_bytes=2_000_000)
    with disk(tmp_path / "unlimited", "0") as folder:
        for path in (folder, tmp_path / "none"):
            monkeypatch.setattr(workers, "SHARED_MEMORY", str(path))
            check_shared_memory(num_workers=2, processes=2, batch_bytes=2_000_000)


PROGRAM = """
from functools import partial
import torch
from torch.utils.data import DataLoader
from trainer.cli import exit_process, run_cli
from trainer.data.workers import init_worker
def load(items):
    start = partial(init_worker, low_priority=True)
    return iter(DataLoader(items, batch_size=1, num_workers=2, collate_fn=torch.stack, worker_init_fn=start))
def train(signals):
    evaluation = load(torch.zeros(999, 9))
    next(evaluation)  # its workers go on
    for batch in load(torch.zeros(9, 600_000)):
        pass
exit_process(run_cli(train))
"""


@pytest.mark.slow
def test_full_shared_memory_ends_the_program_at_once_with_one_sentence(repository: Path) -> None:
    command = [*with_small_shared_memory("2m"), sys.executable, "-c", PROGRAM]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 2
    assert re.fullmatch(r"error: /dev/shm is full: .*docker run --shm-size 8g.*\n", result.stderr), result.stderr
