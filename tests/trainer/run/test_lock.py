"""The lock of a run folder, with real processes: running, stopped, killed, and presumed dead."""

import dataclasses
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from regraft.contract import (
    ATTEMPTS,
    AttemptRecord,
    AttemptState,
    attempt_path,
    latest_attempt,
    read_attempt,
    read_attempts,
)
from tests.launching import REPOSITORY, wait_until
from tests.trainer.runs import stop_heartbeat
from trainer.errors import UserError
from trainer.run import lock as lock_module
from trainer.run.lock import RunLock, is_torchrun_restart, wait_until_released

OTHER_HOST = "9b2f1d0e-0000-4000-8000-000000000000 pid:[4026531836]"
Acquire = Callable[..., RunLock]


@pytest.fixture
def acquire() -> Iterator[Acquire]:
    """Return `RunLock.acquire` with a short timeout."""
    locks: list[RunLock] = []

    def acquire(folder: Path, *, timeout: float = 0.2, log: Callable[[str], object] = lambda line: None) -> RunLock:
        locks.append(RunLock.acquire(folder, log=log, timeout=timeout))
        return locks[-1]

    yield acquire
    for lock in locks:
        stop_heartbeat(lock)


@pytest.fixture
def sleeper(tmp_path_factory: pytest.TempPathFactory) -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that runs until it is killed; its name is like the fields that follow it in /proc/PID/stat."""
    program = tmp_path_factory.mktemp("bin") / ") R 1 (x"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as process:
        wait_until(lambda: ") R 1" in Path(f"/proc/{process.pid}/stat").read_text())
        yield process
        process.kill()


def own_record(**changes: Any) -> AttemptRecord:
    return dataclasses.replace(lock_module._own_record(1), **changes)


def record_of(process: subprocess.Popen[Any], **changes: Any) -> AttemptRecord:
    return own_record(pid=process.pid, started=lock_module._process_start(process.pid), **changes)


def write_record(folder: Path, record: AttemptRecord) -> Path:
    """Write an attempt's file, as another process would."""
    path = attempt_path(folder, record.attempt)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder / "temporary"
    temporary.write_text(record.to_json())
    return temporary.replace(path)


def refusal(acquire: Acquire, folder: Path, **options: Any) -> str:
    """Return why the lock cannot be acquired; nothing in `attempts/` may change."""
    before = {p.name: p.read_bytes() for p in (folder / ATTEMPTS).iterdir()}
    with pytest.raises(UserError) as caught:
        acquire(folder, **options)
    assert {p.name: p.read_bytes() for p in (folder / ATTEMPTS).iterdir()} == before
    return str(caught.value)


def test_each_start_takes_the_next_number_and_records_its_process(acquire: Acquire, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "图"
    assert wait_until_released(folder, log=print) == 0
    states: tuple[AttemptState, ...] = ("done", "stopped", "failed")
    for number, state in enumerate(states, start=1):
        lock = acquire(folder, log=pytest.fail)
        record = read_attempt(attempt_path(folder, number))
        assert record == lock.record
        assert (record.attempt, record.state, record.pid, record.step) == (number, "running", os.getpid(), 0)
        lock.end(state)
    assert sorted(p.name for p in (folder / ATTEMPTS).iterdir()) == ["0001.json", "0002.json", "0003.json"]
    assert len({record.lease_id for record in read_attempts(folder)}) == 3
    assert wait_until_released(folder, log=print) == 3
    write_record(folder, own_record(attempt=9999, state="failed"))
    assert acquire(folder).record.attempt == 10000


def test_a_full_disk_is_a_user_error_and_leaves_no_number_taken(acquire: Acquire, tmp_path: Path) -> None:
    folder, taken = tmp_path / "run", acquire(tmp_path / "other")
    (folder / ATTEMPTS).mkdir(parents=True)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # no byte fits into any file
    try:
        with pytest.raises(UserError, match=r"cannot be written to \(File too large\)"):
            acquire(folder)
        with pytest.raises(UserError, match=r"0001\.json: cannot be written \(File too large\).*make room"):
            taken.update(step=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((folder / ATTEMPTS).iterdir()) == []
    assert acquire(folder).record.attempt == 1
    with pytest.raises(UserError, match=r"cannot be written to \(Not a directory\)"):
        acquire(attempt_path(folder, 1) / "run")


@pytest.mark.parametrize("kind", ["running", "suspended", "killed", "zombie", "pid of another process"])
def test_a_running_process_is_refused_and_a_dead_one_followed_at_once(
    kind: str, acquire: Acquire, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    record = record_of(sleeper, host="node17")
    assert -1 < time.clock_gettime(time.CLOCK_BOOTTIME) - record.started / os.sysconf("SC_CLK_TCK") < 60
    if kind == "pid of another process":
        record = dataclasses.replace(record, started=record.started - 1)
    elif kind in ("killed", "zombie"):
        sleeper.kill()
        os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # not reaped: still in the process list
        assert Path(f"/proc/{sleeper.pid}/stat").exists()
        if kind == "killed":
            sleeper.wait()
    elif kind == "suspended":
        sleeper.send_signal(signal.SIGSTOP)
    write_record(tmp_path, record)
    if kind in ("running", "suspended"):
        assert refusal(acquire, tmp_path, timeout=1000, log=pytest.fail) == (
            f"run.dir {tmp_path}: attempt 1 of this run is still running (process {sleeper.pid} on node17, since "
            f"{record.began}): choose another run.dir, wait for it, or ask it to stop by a file named STOP in that "
            "folder"
        )
    else:
        assert acquire(tmp_path, timeout=1000, log=pytest.fail).record.attempt == 2


@pytest.mark.parametrize("content", [None, ""])
def test_a_heartbeat_of_another_machine_is_refused(content: str | None, acquire: Acquire, tmp_path: Path) -> None:
    path = write_record(tmp_path, own_record(pid_namespace=OTHER_HOST, host="node17", pid=17))
    if content is not None:
        path.write_text(content)
    ended = threading.Event()

    def send_heartbeats() -> None:
        while not ended.wait(0.02):
            os.utime(path)

    thread = threading.Thread(target=send_heartbeats)
    thread.start()
    text = refusal(acquire, tmp_path, timeout=10)
    ended.set()
    thread.join()
    who = "process 17 on node17, since" if content is None else "a process)"
    assert f"attempt 1 of this run is still running ({who}" in text


def test_silence_and_an_end_during_the_wait_are_followed(
    acquire: Acquire, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    # A process of this machine has the same pid, which means nothing.
    record = record_of(sleeper, pid_namespace=OTHER_HOST, host="node17")
    write_record(tmp_path, record)
    lines: list[str] = []
    lock = acquire(tmp_path, timeout=0.3, log=lines.append)
    lock._path.write_text(record.to_json()[:50])
    assert acquire(tmp_path, timeout=0.1, log=lines.append).record.attempt == 3
    end = " and did not record how it ended: waiting 0 s for a heartbeat"
    who = ("attempt 1 of this run ran on node17", "attempt 2 of this run has left no readable record")
    assert lines == [f"{one}{end}" for one in who]
    write_record(tmp_path, dataclasses.replace(record, attempt=4))
    ended = dataclasses.replace(record, attempt=4, state="stopped")
    assert acquire(tmp_path, timeout=0.4, log=lambda line: write_record(tmp_path, ended)).record.attempt == 5


def test_an_attempt_that_was_taken_over_writes_nothing(acquire: Acquire, tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    lock.update(step=3)
    lock.check()
    before = lock._path.read_bytes()
    write_record(tmp_path, own_record(attempt=2, host="node17", pid=4711))
    for write in (lock.check, lambda: lock.update(step=4), lambda: lock.end("done")):
        with pytest.raises(UserError, match=r"attempt 2 on node17, process 4711 has taken over .*end one of the two"):
            write()
    assert lock._path.read_bytes() == before
    assert not lock._thread.is_alive(), "nor sends it a heartbeat after `end`"
    write_record(tmp_path, own_record(attempt=7)).write_text("")
    with pytest.raises(UserError, match="another attempt has taken over"):
        lock.check()


def test_a_run_that_was_moved_is_not_written_any_more(acquire: Acquire, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = acquire(folder)
    folder.rename(tmp_path / "run.earlier-1")
    for write in (old.check, lambda: old.update(step=9)):
        with pytest.raises(UserError, match=rf"^{folder} is gone: it was deleted or moved"):
            write()
    assert not folder.exists()
    (folder / ATTEMPTS).mkdir(parents=True)
    (folder / ATTEMPTS).rename(folder / "elsewhere")
    with pytest.raises(UserError, match=rf"^{folder / ATTEMPTS} is gone"):
        old.check()
    new = acquire(folder)
    assert new.record.attempt == old.record.attempt
    with pytest.raises(UserError, match=rf"attempt 1 on .* process {os.getpid()} has taken over this run"):
        old.update(step=9)
    assert latest_attempt(folder) == new.record


def test_position_and_end_are_recorded(acquire: Acquire, tmp_path: Path) -> None:
    lock = acquire(tmp_path)
    lock.update(stage="pretrain", step=4, steps=12, epoch=1, epochs=3)
    lock.update(step=5)
    record = latest_attempt(tmp_path)
    changes = {"stage": "pretrain", "step": 5, "steps": 12, "epoch": 1, "epochs": 3, "state": "running", "ended": None}
    assert record == dataclasses.replace(record, **changes)
    lock.end("failed", "no\n\x1b[31m图\udcff" + "x" * 5000)
    lock.end("stopped", "a later error")
    record = latest_attempt(tmp_path)
    assert record == lock.record
    assert (record.state, record.step, record.ended is None) == ("failed", 5, False)
    assert record.reason == "no\\n\\x1b[31m图\\xff" + "x" * 1983


def test_heartbeats_are_sent_until_the_end(acquire: Acquire, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert lock_module.HEARTBEAT_TIMEOUT > 3 * lock_module.HEARTBEAT_SECONDS
    monkeypatch.setattr(lock_module, "HEARTBEAT_SECONDS", 0.01)
    lock = acquire(tmp_path)

    def wait_for_heartbeat() -> None:
        first = lock._path.stat().st_mtime_ns
        wait_until(lambda: lock._path.stat().st_mtime_ns != first)

    lock.update(step=1)
    wait_for_heartbeat()
    (tmp_path / ATTEMPTS).rename(tmp_path / "away")  # for a while, as on a network file system
    time.sleep(0.05)
    (tmp_path / "away").rename(tmp_path / ATTEMPTS)
    wait_for_heartbeat()
    assert latest_attempt(tmp_path) == lock.record
    lock.end("stopped", "STOP")
    assert not lock._thread.is_alive()


def test_a_restart_by_torchrun_is_recognized(tmp_path: Path) -> None:
    torchrun = {"TORCHELASTIC_RUN_ID": "x"}
    launcher = lock_module._launcher(torchrun)
    assert not is_torchrun_restart(tmp_path, {})
    assert is_torchrun_restart(tmp_path, {"TORCHELASTIC_RESTART_COUNT": "1"})
    write_record(tmp_path, own_record(launcher=launcher))
    assert is_torchrun_restart(tmp_path, torchrun), "another host failed: the restart count of this one is still 0"
    assert not is_torchrun_restart(tmp_path, {"TORCHELASTIC_RUN_ID": "y"})
    write_record(tmp_path, own_record(launcher=None))
    assert not is_torchrun_restart(tmp_path, {})


RACER = """
import sys, time
from pathlib import Path
from trainer.run import lock
from trainer.run.lock import RunLock
from trainer.errors import UserError
lock.HEARTBEAT_SECONDS = 0.05
print("ready", flush=True)
for line in sys.stdin:
    folder, at, then = line.rstrip("\\n").split("\\t")
    while time.monotonic() < float(at):  # busy: all start at the same instant
        pass
    try:
        own = RunLock.acquire(Path(folder), log=lambda line: None, timeout=5)
    except UserError as error:
        print("refused", error, flush=True)
        continue
    own.check()
    if then == "end":
        own.end("done")
    print("acquired", own.record.attempt, flush=True)
"""


Racers = list[Any]


@pytest.fixture
def racers() -> Iterator[Racers]:
    command, pipe = [sys.executable, "-c", RACER], subprocess.PIPE
    processes: Racers = [subprocess.Popen(command, cwd=REPOSITORY, text=True, stdin=pipe, stdout=pipe) for _ in "123"]
    assert {process.stdout.readline() for process in processes} == {"ready\n"}
    yield processes
    for process in processes:
        process.kill()
        process.communicate()


def race(racers: Racers, folder: Path, then: str) -> list[str]:
    start = time.monotonic() + 0.02
    for racer in racers:
        racer.stdin.write(f"{folder}\t{start}\t{then}\n")
        racer.stdin.flush()
    return [racer.stdout.readline().rstrip("\n") for racer in racers]


@pytest.mark.parametrize("earlier", [None, "done", "running"])
def test_of_simultaneous_starts_exactly_one_acquires_the_lock(
    earlier: str | None, racers: Racers, tmp_path: Path
) -> None:
    number = 1 if earlier is None else 2
    for repetition in range(15):
        folder = tmp_path / str(repetition)
        if earlier is not None:
            write_record(folder, own_record(state=earlier, started=1))
        answers = race(racers, folder, "hold")
        winner = racers[answers.index(f"acquired {number}")]
        refused = f"attempt {number} of this run is still running (process {winner.pid} on "
        assert sum(refused in answer for answer in answers) == len(racers) - 1, answers
        assert len(list((folder / ATTEMPTS).glob("*.json"))) == number


def test_no_number_is_taken_twice(racers: Racers, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    rng = random.Random(seed)
    numbers: list[int] = []
    for _ in range(25):
        answers = race(rng.sample(racers, rng.randint(2, len(racers))), tmp_path, "end")
        acquired = [int(answer.split()[1]) for answer in answers if answer.startswith("acquired")]
        assert acquired, answers
        numbers += acquired
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(list((tmp_path / ATTEMPTS).iterdir())) == len(numbers)
