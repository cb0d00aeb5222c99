"""Tests of the time for which threads wait for a core."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from trainer.optim.core_wait import MAX_FRACTION, CoreWait


def spin(seconds: float) -> None:
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_other_processes_on_the_same_core_are_noticed() -> None:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})  # of this thread, and of the processes that it starts
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(3)]
    try:
        time.sleep(0.3)
        wait = CoreWait()
        spin(1)
        is_counted = int(Path("/proc/self/schedstat").read_text().split()[0]) > 0  # not by every kernel
        assert (wait.fraction() > 2 * MAX_FRACTION) == is_counted
    finally:
        for process in others:
            process.kill()
            process.wait()
        os.sched_setaffinity(0, cores)


def test_a_kernel_that_does_not_count_is_never_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pathlib.Path.read_text", lambda *_, **__: "0")
    assert CoreWait().fraction() == 0.0
