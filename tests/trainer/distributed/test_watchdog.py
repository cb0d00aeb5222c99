"""The watchdog, with real processes that hang, work, or are suspended."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from regraft.contract import ERROR_FILE, HANG_WAITING, HANGS
from tests.launching import REPOSITORY
from trainer.config.sections.run import RunConfig
from trainer.distributed import watchdog
from trainer.distributed.watchdog import EXTENDED_TIMEOUT, MIN_TIMEOUT, Heartbeat, StallDetector, Watchdog
from trainer.errors import UserError

STACKS = f"{HANGS}/0003-rank-1.txt"
PROGRAM = """
import bdb, ctypes, multiprocessing, signal, sys, time
from pathlib import Path
from regraft.parent_death import signal_on_parent_death
from trainer.distributed.watchdog import Heartbeat, Watchdog

heartbeat, folder, action = Heartbeat(), Path(sys.argv[1]), sys.argv[2]

def work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        heartbeat.tick(7)
        time.sleep(0.01)

def stuck():
    signal_on_parent_death(signal.SIGKILL)
    time.sleep(60)

with Watchdog(1.0, heartbeat, folder=folder, attempt=3, rank=1, world_size=2, lock=None):
    work(0.1)
    print("started", flush=True)
    exec(compile({"sleep": "time.sleep(60)", "GIL": "ctypes.PyDLL(None).usleep(60_000_000)", "work": "work(1.5)",
                  "worker": "w = multiprocessing.get_context('fork').Process(target=stuck); w.start(); w.join()",
                  "debugger": "time.sleep(2)", "fail": "raise ValueError('its own')"}[action], "hang.py", "exec"),
         {**globals(), "__name__": "pdb" if action == "debugger" else "hang"})
    work(0.2)
print("ended", flush=True)
"""


@contextmanager
def watched(folder: Path, action: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process with a watchdog, which then does the action."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), ERROR_FILE: str(folder / "error.json")}
    command, pipe = [sys.executable, "-c", PROGRAM, folder, action], subprocess.PIPE
    process = subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)
    try:
        assert process.stdout.readline() == "started\n", process.communicate()[1]  # type: ignore[union-attr]
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_process_that_hangs_writes_its_stacks_and_exits(tmp_path: Path) -> None:
    with watched(tmp_path, "sleep") as process:
        printed = process.communicate(timeout=30)[1]
        assert process.returncode == 1
    assert printed.startswith("[rank 1] error: no step for 1 s, the last one was 7; it was in <module> (hang.py:1)")
    assert printed.endswith(f"; stacks in {tmp_path / STACKS}\n")
    lines = (tmp_path / STACKS).read_text().splitlines()
    assert lines[0].startswith("attempt 3, rank 1 of 2, host ")
    assert "1 s were allowed (run.hang_timeout)" in lines
    assert sum(line.endswith("(most recent call first):") for line in lines) >= 2, "of every thread"
    assert any('File "hang.py", line 1 in <module>' in line for line in lines)
    message = json.loads((tmp_path / "error.json").read_text())["message"]["message"]
    assert f"[rank 1] error: {message.removeprefix('Hang: ')}\n" == printed


def test_the_stacks_of_its_workers_are_written_too(tmp_path: Path) -> None:
    with watched(tmp_path, "worker") as process:
        process.communicate(timeout=30)
        assert process.returncode == 1
    text = (tmp_path / STACKS).read_text()
    worker, own = text.split("\nworker process ")[1].split("\n\n", 1)
    assert " in stuck\n" in worker
    assert " in stuck\n" not in own
    assert "in wait\n" in own, "the main thread waits for its worker"


def test_a_process_that_holds_the_gil_writes_its_stacks(tmp_path: Path) -> None:
    with watched(tmp_path, "GIL") as process:
        deadline = time.monotonic() + 30
        while 'File "hang.py", line 1 in <module>' not in (tmp_path / STACKS).read_text():
            assert time.monotonic() < deadline
            assert process.poll() is None, "only the watchdogs of other ranks can end it"
            time.sleep(0.01)
    assert "Timeout (0:00:01)!" in (tmp_path / STACKS).read_text()


@pytest.mark.parametrize(("action", "code"), [("work", 0), ("fail", 1), ("debugger", 0)])
def test_a_process_that_works_fails_or_is_debugged_does_not_hang(action: str, code: int, tmp_path: Path) -> None:
    with watched(tmp_path, action) as process:
        printed = process.communicate(timeout=30)[1]
        assert process.returncode == code
    assert "no step" not in printed
    assert not (tmp_path / HANGS).exists()


def test_a_suspended_process_does_not_hang(tmp_path: Path) -> None:
    with watched(tmp_path, "work") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        time.sleep(1.5)  # longer than the timeout
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "ended\n"
    assert not (tmp_path / HANGS).exists()


def is_overdue(detector: StallDetector, heartbeat: Heartbeat, seconds: float) -> bool:
    """Let seconds pass without a tick; return whether the tick was ever overdue."""
    return any(detector.update(1.0, heartbeat) for _ in range(round(seconds)))


def after_warmup(longest: float) -> tuple[StallDetector, Heartbeat]:
    """Return a detector whose longest interval so far is given; the one before the first tick does not count."""
    detector, heartbeat = StallDetector(None), Heartbeat()
    for step in range(1, watchdog.WARMUP_TICKS + 3):
        assert not is_overdue(detector, heartbeat, 900 if step == 1 else longest - 1)
        heartbeat.tick(step)
        detector.update(1.0, heartbeat)
    return detector, heartbeat


@pytest.mark.parametrize(
    ("longest", "timeout"),
    [(1, MIN_TIMEOUT), (20, MIN_TIMEOUT), (60, 60 * watchdog.INTERVAL_FACTOR), (400, 400 * watchdog.INTERVAL_FACTOR)],
)
def test_auto_timeout_follows_the_longest_interval(longest: float, timeout: float) -> None:
    detector, heartbeat = after_warmup(longest)
    assert detector.timeout == timeout
    assert not is_overdue(detector, heartbeat, timeout)
    assert detector.update(1.0, heartbeat)
    assert detector.idle_seconds == timeout + 1


def test_timeout_is_extended_for_the_first_ticks_and_for_slow_disks() -> None:
    detector, heartbeat = StallDetector(None), Heartbeat()
    assert not is_overdue(detector, heartbeat, EXTENDED_TIMEOUT)
    assert is_overdue(detector, heartbeat, 1)
    detector, heartbeat = after_warmup(2)
    for step in (98, 99):
        heartbeat.extend_timeout()
        assert not is_overdue(detector, heartbeat, EXTENDED_TIMEOUT)
        heartbeat.tick(step)
        detector.update(1.0, heartbeat)
        assert detector.timeout == MIN_TIMEOUT, "a slow disk is not the pace of training"
    detector, heartbeat = StallDetector(20.0), Heartbeat()
    heartbeat.extend_timeout()
    assert not is_overdue(detector, heartbeat, 20)
    assert is_overdue(detector, heartbeat, 1), "a fixed timeout is never extended"


@pytest.mark.parametrize("value", [0.0, -1.0, 1e7, float("inf"), float("nan")])
def test_an_invalid_hang_timeout_is_refused(value: float) -> None:
    with pytest.raises(UserError, match=r"run\.hang_timeout is .*expected seconds \(above 0, up to 1,000,000\)"):
        RunConfig(hang_timeout=value)


def make_watchdog(folder: Path, timeout: Any = "auto", *, attempt: int = 1) -> Watchdog:
    return Watchdog(timeout, Heartbeat(), folder=folder, attempt=attempt, rank=0, world_size=2, lock=None)


def test_files_without_stacks_are_removed(tmp_path: Path) -> None:
    with make_watchdog(tmp_path, None):
        assert list(tmp_path.iterdir()) == []
    (tmp_path / HANGS).mkdir()
    for name, text in (
        ("0001-rank-0.txt", "attempt 1, rank 0 of 2, host h, process 7\n"),
        ("0001-rank-1.txt", "attempt 1, rank 1 of 2, host h, process 8\nno step for 300 s\n"),
        ("0003-rank-1.txt", "attempt 3, rank 1 of 2, host h, process 9\n"),
        ("notes.txt", "mine\n"),
    ):
        (tmp_path / HANGS / name).write_text(text)
    with make_watchdog(tmp_path, attempt=2):
        assert (tmp_path / HANGS / "0002-rank-0.txt").exists()
    names = sorted(path.name for path in (tmp_path / HANGS).iterdir())
    assert names == ["0001-rank-1.txt", "0003-rank-1.txt", "notes.txt"]
    (tmp_path / HANGS).rename(tmp_path / "elsewhere")
    (tmp_path / HANGS).write_text("a file")
    with pytest.raises(UserError, match=r"0001-rank-0\.txt: cannot be written"):
        make_watchdog(tmp_path)


def test_the_innermost_call_is_described() -> None:
    def frame(path: str, name: str) -> Any:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=path, co_name=name), f_lineno=5)

    fit = frame(str(REPOSITORY / "trainer" / "loop.py"), "fit")
    all_reduce = frame("/x/torch/distributed/distributed_c10d.py", "all_reduce")
    backward = frame("/x/torch/autograd/graph.py", "_engine_run_backward")
    select = frame("/usr/lib/selectors.py", "select")
    in_backward = "in _engine_run_backward (autograd/graph.py:5)"
    for stack, world_size, expected in (
        ([all_reduce, fit], 2, f"{HANG_WAITING} in all_reduce (distributed/distributed_c10d.py:5)"),
        ([backward, fit], 2, f"{HANG_WAITING} {in_backward}"),
        ([backward, fit], 1, f"it was {in_backward}, called from fit (trainer/loop.py:5)"),
        ([select, fit], 2, "it was in select (lib/selectors.py:5), called from fit (trainer/loop.py:5)"),
        ([fit], 2, "it was in fit (trainer/loop.py:5)"),
        (watchdog.stack_of(None), 2, "without a main thread"),
    ):
        assert watchdog.describe_stack(stack, world_size=world_size) == expected
