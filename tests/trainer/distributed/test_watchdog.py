"""A hang is noticed, in processes of their own; and what only looks like one is not."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launching import REPOSITORY
from trainer.config.schema import RunConfig
from trainer.distributed.error_file import ERROR_FILE
from trainer.distributed.watchdog import (
    FACTOR,
    FIRST,
    HANGS,
    LEAST,
    PATIENT,
    Heartbeat,
    StallDetector,
    Watchdog,
    describe_stack,
    frames,
)
from trainer.errors import UserError

PROGRAM = """
import bdb, ctypes, sys, time
from pathlib import Path
from trainer.distributed.watchdog import Heartbeat, Watchdog

heartbeat, folder, what = Heartbeat(), Path(sys.argv[1]), sys.argv[2]

def work(seconds):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        heartbeat.beat(7)
        time.sleep(0.01)

watch = Watchdog(1.0, heartbeat, folder=folder, number=3, rank=1, world_size=2, attempt=None)
with watch:
    work(0.1)
    print("works", flush=True)
    exec(compile({"sleep": "time.sleep(60)", "lock": "ctypes.PyDLL(None).usleep(60_000_000)", "work": "work(1.5)",
                  "debugger": "time.sleep(2)", "fail": "raise ValueError('its own')"}[what], "hang.py", "exec"),
         {**globals(), "__name__": "pdb" if what == "debugger" else "hang"})
    work(0.2)
print("ends", flush=True)
"""


@contextmanager
def watched(folder: Path, what: str) -> Iterator[subprocess.Popen[str]]:
    """Start a process that is watched, and does something of that name."""
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, folder, what],
        env={**os.environ, "PYTHONPATH": str(REPOSITORY), ERROR_FILE: str(folder / "error.json")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "works\n", process.communicate()[1]
        yield process
    finally:
        process.kill()
        process.communicate()


def stacks(folder: Path) -> str:
    return (folder / HANGS / "0003-rank-1.txt").read_text()


def test_a_process_that_hangs_writes_its_stacks_tells_of_them_and_ends(tmp_path: Path) -> None:
    with watched(tmp_path, "sleep") as process:
        said = process.communicate(timeout=30)[1]
        assert process.returncode == 1
    path = tmp_path / HANGS / "0003-rank-1.txt"
    assert said.startswith(
        "[rank 1] error: no step for 1 s, the last one was 7; it was in <module> (hang.py:1)"
    )
    assert said.endswith(f"; stacks in {path}\n")
    written = stacks(tmp_path).splitlines()
    assert written[0].startswith("attempt 3, rank 1 of 2, host ")
    assert "1 s were allowed (run.hang_timeout)" in written
    assert sum(line.endswith("(most recent call first):") for line in written) >= 2, "of every thread"
    assert 'File "hang.py", line 1 in <module>' in stacks(tmp_path)
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert f"[rank 1] error: {told['message'].removeprefix('Hang: ')}\n" == said


def test_one_that_keeps_pythons_lock_has_its_stacks_written_all_the_same(tmp_path: Path) -> None:
    with watched(tmp_path, "lock") as process:
        until = time.monotonic() + 30
        while 'File "hang.py", line 1 in <module>' not in stacks(tmp_path):
            assert time.monotonic() < until
            assert process.poll() is None, "nothing but its partners can end it"
            time.sleep(0.01)
    assert "Timeout (0:00:01)!" in stacks(tmp_path)


@pytest.mark.parametrize(("what", "code"), [("work", 0), ("fail", 1), ("debugger", 0)])
def test_one_that_works_fails_or_is_debugged_is_left_alone(what: str, code: int, tmp_path: Path) -> None:
    with watched(tmp_path, what) as process:
        said = process.communicate(timeout=30)[1]
        assert process.returncode == code
    assert "no step" not in said
    assert not (tmp_path / HANGS).exists(), "nothing is left of the watch"


def test_one_that_was_stopped_has_not_hung(tmp_path: Path) -> None:
    with watched(tmp_path, "work") as process:
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        time.sleep(1.5)  # longer than allowed: what is tested
        process.send_signal(signal.SIGCONT)
        assert process.communicate(timeout=30)[0] == "ends\n"
        assert process.returncode == 0
    assert not (tmp_path / HANGS).exists()


def ticks(pace: StallDetector, heartbeat: Heartbeat, seconds: float) -> bool:
    """Let time pass without a boundary, a second at a time; returns whether it was too long."""
    return any(pace.update(1.0, heartbeat) for _ in range(round(seconds)))


def paced(longest: float) -> tuple[StallDetector, Heartbeat]:
    """Return the pace of a run that has gone on for a while."""
    pace, heartbeat = StallDetector(None), Heartbeat()
    for step in range(1, FIRST + 3):
        assert not ticks(pace, heartbeat, 900 if step == 1 else longest - 1)  # the first one does not count
        heartbeat.tick(step)
        pace.update(1.0, heartbeat)
    return pace, heartbeat


@pytest.mark.parametrize(
    ("longest", "allowed"), [(1, LEAST), (20, LEAST), (60, 60 * FACTOR), (400, 400 * FACTOR)]
)
def test_the_time_allowed_follows_from_the_longest_interval_so_far(longest: float, allowed: float) -> None:
    pace, heartbeat = paced(longest)
    assert pace.allowed == allowed
    assert not ticks(pace, heartbeat, allowed)
    assert pace.update(1.0, heartbeat)
    assert pace.quiet == allowed + 1


def test_the_first_steps_may_take_longer() -> None:
    pace, heartbeat = StallDetector(None), Heartbeat()
    assert not ticks(pace, heartbeat, PATIENT)
    assert ticks(pace, heartbeat, 1)


def test_a_slow_disk_is_waited_for_and_does_not_change_the_pace() -> None:
    pace, heartbeat = paced(2)
    heartbeat.extend_timeout()
    assert not ticks(pace, heartbeat, PATIENT)
    heartbeat.tick(99)
    pace.update(1.0, heartbeat)
    assert pace.allowed == LEAST
    heartbeat.extend_timeout()
    assert ticks(pace, heartbeat, PATIENT + 1), "but not for ever"


def test_a_number_of_seconds_holds_everywhere() -> None:
    pace, heartbeat = StallDetector(20.0), Heartbeat()
    heartbeat.extend_timeout()
    assert not ticks(pace, heartbeat, 20)
    assert ticks(pace, heartbeat, 1)


def test_a_run_that_goes_on_is_never_overdue() -> None:
    print(f"seed {(seed := random.randrange(1 << 30))}")
    random_, pace, heartbeat = random.Random(seed), StallDetector(None), Heartbeat()
    for step in range(2000):
        assert not ticks(pace, heartbeat, random_.randrange(int(LEAST)))
        if random_.random() < 0.1:
            heartbeat.extend_timeout()
            assert not ticks(pace, heartbeat, random_.randrange(int(PATIENT - LEAST)))
        heartbeat.tick(step)


def test_nothing_is_watched_if_not_asked_for(tmp_path: Path) -> None:
    with Watchdog(None, Heartbeat(), folder=tmp_path, attempt=1, rank=0, world_size=1, lock=None):
        assert list(tmp_path.iterdir()) == []


def test_stages_and_ranks_share_a_folder_that_is_gone_in_the_end(tmp_path: Path) -> None:
    def watch(rank: int) -> Watchdog:
        return Watchdog("auto", Heartbeat(), folder=tmp_path, attempt=12, rank=rank, world_size=2, lock=None)

    with watch(0):
        with watch(1):
            assert sorted(p.name for p in (tmp_path / HANGS).iterdir()) == [
                "0012-rank-0.txt",
                "0012-rank-1.txt",
            ]
        assert [p.name for p in (tmp_path / HANGS).iterdir()] == ["0012-rank-0.txt"]
    assert list(tmp_path.iterdir()) == []


def test_what_killed_attempts_have_left_is_removed_but_for_stacks(tmp_path: Path) -> None:
    (tmp_path / HANGS).mkdir()
    for name, text in (
        ("0001-rank-0.txt", "attempt 1, rank 0 of 2, host h, process 7\n"),
        ("0001-rank-1.txt", "attempt 1, rank 1 of 2, host h, process 8\nno step for 300 s\n"),
        ("0003-rank-1.txt", "attempt 3, rank 1 of 2, host h, process 9\n"),
        ("notes.txt", "mine\n"),
    ):
        (tmp_path / HANGS / name).write_text(text)
    with Watchdog("auto", Heartbeat(), folder=tmp_path, attempt=2, rank=0, world_size=2, lock=None):
        pass
    left = sorted(path.name for path in (tmp_path / HANGS).iterdir())
    assert left == ["0001-rank-1.txt", "0003-rank-1.txt", "notes.txt"]


def test_a_folder_that_cannot_be_written_to_is_an_error_before_training(tmp_path: Path) -> None:
    (tmp_path / HANGS).write_text("a file")
    with pytest.raises(UserError, match=r"0001-rank-0\.txt: cannot be written"):
        Watchdog("auto", Heartbeat(), folder=tmp_path, attempt=1, rank=0, world_size=1, lock=None)


@pytest.mark.parametrize("given", [0.0, -1.0, 1e7, float("inf"), float("nan")])
def test_a_time_that_makes_no_sense_is_refused(given: float) -> None:
    with pytest.raises(
        UserError,
        match=r"run\.hang_timeout is .*expected seconds \(above 0, up to 1,000,000\), auto, or null",
    ):
        RunConfig(hang_timeout=given)


def test_a_rank_in_an_exchange_waits_for_the_others() -> None:
    def frame(path: str, name: str) -> SimpleNamespace:
        return SimpleNamespace(f_code=SimpleNamespace(co_filename=path, co_name=name), f_lineno=5)

    ours = frame(str(REPOSITORY / "trainer" / "loop.py"), "fit")
    exchange = frame("/x/torch/distributed/distributed_c10d.py", "all_reduce")
    backward = frame("/x/torch/autograd/graph.py", "_engine_run_backward")
    select = frame("/usr/lib/selectors.py", "select")
    stack = [exchange, ours]
    assert (
        describe_stack(stack, world_size=2)
        == "waiting for the other ranks in all_reduce (distributed/distributed_c10d.py:5)"
    )
    assert describe_stack([backward, ours], world_size=2).startswith(
        "waiting for the other ranks in _engine_run_backward"
    )
    assert describe_stack([backward, ours], world_size=1).startswith("it was in _engine_run_backward")
    assert (
        describe_stack([select, ours], world_size=2)
        == "it was in select (lib/selectors.py:5), called from fit (trainer/loop.py:5)"
    )
    assert describe_stack([ours], world_size=2) == "it was in fit (trainer/loop.py:5)"
    assert describe_stack(frames(None), world_size=2) == "without a main thread"
