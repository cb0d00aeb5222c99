"""Who works on a run: with real processes, living, killed and undead."""

import dataclasses
import json
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

from tests.launching import REPOSITORY
from trainer.errors import UserError
from trainer.run import lock
from trainer.run.lock import (
    ATTEMPTS,
    AttemptRecord,
    RunLock,
    latest_attempt,
    read_attempts,
    read_record,
    wait_until_released,
)

ELSEWHERE = "9b2f1d0e-0000-4000-8000-000000000000 pid:[4026531836]"
HOLDER = """
import sys
from pathlib import Path
from trainer.run.lock import RunLock
attempt = RunLock.acquire(Path(sys.argv[1]), log=print)
print("held", flush=True)
sys.stdin.read()
attempt.end("done")
"""


Claim = Callable[..., RunLock]


@pytest.fixture
def claim() -> Iterator[Claim]:
    """Return `RunLock.claim` with little patience; what it made gives no signs after the test."""
    made: list[RunLock] = []

    def claim(
        folder: Path, *, patience: float = 0.2, log: Callable[[str], object] = lambda line: None
    ) -> RunLock:
        made.append(RunLock.acquire(folder, log=log, patience=patience))
        return made[-1]

    yield claim
    for attempt in made:
        attempt._over.set()
        attempt._thread.join()


@pytest.fixture
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """Return a process that lives until it is killed."""
    with subprocess.Popen(["sleep", "1000"]) as process:
        yield process
        process.kill()


def record(**changes: Any) -> AttemptRecord:
    return dataclasses.replace(lock._own_record(1), **changes)


def of(process: subprocess.Popen[Any], **changes: Any) -> AttemptRecord:
    started = lock._start_of(process.pid)
    assert started is not None
    return record(pid=process.pid, started=started, **changes)


def path(folder: Path, number: int = 1) -> Path:
    return folder / ATTEMPTS / f"{number:04}.json"


def leave(folder: Path, found: AttemptRecord) -> Path:
    """Leave an attempt's file, as another process would."""
    (folder / ATTEMPTS).mkdir(parents=True, exist_ok=True)
    path(folder, found.attempt).write_text(json.dumps(dataclasses.asdict(found)))
    return path(folder, found.attempt)


def refusal(claim: Claim, folder: Path, **options: Any) -> str:
    """Return why nobody else may work on the run; nothing is taken or changed."""
    before = {p.name: p.read_bytes() for p in (folder / ATTEMPTS).iterdir()}
    with pytest.raises(UserError) as caught:
        claim(folder, **options)
    assert {p.name: p.read_bytes() for p in (folder / ATTEMPTS).iterdir()} == before
    return str(caught.value)


def wait_until(holds: Callable[[], bool], what: str) -> None:
    until = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < until, f"it did not come about: {what}"
        time.sleep(0.005)


# --- taking the next number


def test_each_start_takes_the_next_number_and_says_who_it_is(claim: Claim, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "图"
    for number in (1, 2, 3):
        attempt = claim(folder)
        found = read_record(path(folder, number))
        assert found == attempt.record
        assert (found.attempt, found.state, found.pid, found.step) == (number, "running", os.getpid(), 0)
        assert found.host
        attempt.end("done")
    assert sorted(p.name for p in (folder / ATTEMPTS).iterdir()) == ["0001.json", "0002.json", "0003.json"]
    assert len({found.lease_id for found in read_attempts(folder)}) == 3
    assert latest_attempt(folder) == (3, attempt.record)


def test_a_folder_without_attempts_is_free(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path, tmp_path / "nowhere", tmp_path / "file"):
        assert latest_attempt(folder) == (0, None)
        assert read_attempts(folder) == []
        assert wait_until_released(folder, log=print) == 0


def test_numbers_go_on_after_9999_and_other_files_are_none(claim: Claim, tmp_path: Path) -> None:
    for name in ("notes.json", "12.txt", "٣.json", "0007.json.tmp", ".0008.json.1.tmp", "-5.json"):
        (tmp_path / ATTEMPTS).mkdir(exist_ok=True)
        (tmp_path / ATTEMPTS / name).write_text("mine")
    leave(tmp_path, record(attempt=9999, state="failed"))
    assert claim(tmp_path).record.attempt == 10000
    assert claim(tmp_path.parent / "other").record.attempt == 1


@pytest.mark.parametrize("state", ["stopped", "done", "failed"])
def test_an_attempt_that_has_ended_is_no_hindrance(
    state: Any, claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    said: list[str] = []
    leave(tmp_path, of(sleeper, state=state))
    assert claim(tmp_path, log=said.append).record.attempt == 2
    assert said == []


def test_a_folder_that_cannot_be_made_is_one_sentence(claim: Claim, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError) as caught:
        claim(tmp_path / "file" / "run")
    assert str(caught.value) == (
        f"run.dir {tmp_path / 'file' / 'run'}: cannot be written to (Not a directory); choose another folder"
    )


def test_a_full_disk_leaves_no_number_taken(claim: Claim, tmp_path: Path) -> None:
    (tmp_path / ATTEMPTS).mkdir()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, hard))  # not a byte fits into any file
    try:
        with pytest.raises(UserError) as caught:
            claim(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "cannot be written to (File too large); choose another folder" in str(caught.value)
    assert list((tmp_path / ATTEMPTS).iterdir()) == []
    assert claim(tmp_path).record.attempt == 1


# --- while another process works on the run


def test_a_run_that_another_process_works_on_is_refused(
    claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    said: list[str] = []
    leave(tmp_path, of(sleeper, host="node17"))
    began = time.monotonic()
    text = refusal(claim, tmp_path, patience=1000, log=said.append)
    assert time.monotonic() - began < 5, "a process of this machine is looked up, not watched"
    assert text == (
        f"run.dir {tmp_path}: attempt 1 of this run is going on (process {sleeper.pid} on node17, since "
        f"{read_record(path(tmp_path)).began}): choose another run.dir, wait for it, or ask it to stop by a file "  # type: ignore[union-attr]
        "named STOP in that folder"
    )
    assert said == []


def test_a_process_that_stands_still_still_works_on_its_run(
    claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    leave(tmp_path, of(sleeper))
    sleeper.send_signal(signal.SIGSTOP)
    assert f"process {sleeper.pid}" in refusal(claim, tmp_path)


def test_a_start_in_another_process_holds_the_run_until_it_is_killed(claim: Claim, tmp_path: Path) -> None:
    program = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(
        program, cwd=REPOSITORY, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"process {holder.pid}" in refusal(claim, tmp_path)
        second = subprocess.run(program, cwd=REPOSITORY, text=True, capture_output=True, check=False)
        assert second.returncode == 1
        assert f"attempt 1 of this run is going on (process {holder.pid} on " in second.stderr
        holder.kill()
        holder.wait()
        said: list[str] = []
        assert claim(tmp_path, patience=1000, log=said.append).record.attempt == 2
        assert said == [], "at once"
        first = read_record(path(tmp_path))
        assert first is not None
        assert (first.pid, first.state) == (holder.pid, "running"), "its record stays as it was left"


# --- taking over from the dead


def test_a_process_that_was_killed_is_followed_at_once(
    claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    leave(tmp_path, of(sleeper))
    sleeper.kill()
    sleeper.wait()
    assert claim(tmp_path, patience=1000).record.attempt == 2


def test_a_zombie_is_dead(claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]) -> None:
    leave(tmp_path, of(sleeper))
    sleeper.kill()
    os.waitid(os.P_PID, sleeper.pid, os.WEXITED | os.WNOWAIT)  # dead, and not waited for: still in the list
    assert Path(f"/proc/{sleeper.pid}/stat").exists()
    assert claim(tmp_path, patience=1000).record.attempt == 2


def test_a_number_that_was_given_to_another_process_is_not_the_owner(
    claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    found = of(sleeper)
    leave(tmp_path, dataclasses.replace(found, started=found.started - 1))
    assert claim(tmp_path, patience=1000).record.attempt == 2


def test_a_name_that_looks_like_the_end_of_itself_is_read_right(tmp_path: Path) -> None:
    # The name of the program stands in parentheses in /proc/pid/stat, and may hold some.
    program = tmp_path / ") R 1 (x"
    shutil.copy("/bin/sleep", program)
    with subprocess.Popen([program, "1000"]) as odd, subprocess.Popen(["sleep", "1000"]) as plain:
        try:
            wait_until(lambda: ") R 1" in Path(f"/proc/{odd.pid}/stat").read_text(), "the program's start")
            ticks = os.sysconf("SC_CLK_TCK")
            for process in (odd, plain):
                age = time.clock_gettime(time.CLOCK_BOOTTIME) - lock._start_of(process.pid) / ticks  # type: ignore[operator]
                assert -1 < age < 30
        finally:
            odd.kill()
            plain.kill()


# --- owners that cannot be looked up


def test_an_owner_elsewhere_is_watched_and_followed_if_it_gives_no_sign(
    claim: Claim, tmp_path: Path, sleeper: subprocess.Popen[bytes]
) -> None:
    # Its number is one of this machine's, of another process: it says nothing.
    leave(tmp_path, of(sleeper, scope=ELSEWHERE, host="node17"))
    said: list[str] = []
    began = time.monotonic()
    assert claim(tmp_path, patience=0.3, log=said.append).record.attempt == 2
    assert time.monotonic() - began >= 0.3
    assert said == [
        "attempt 1 of this run ran on node17 and has not said how it ended: looking for 0 s whether it still gives a "
        "sign of life"
    ]


@pytest.mark.parametrize("content", [None, ""])
def test_an_owner_elsewhere_that_gives_signs_of_life_is_left_in_peace(
    content: str | None, claim: Claim, tmp_path: Path
) -> None:
    file = leave(tmp_path, record(scope=ELSEWHERE, host="node17", pid=17))
    if content is not None:
        file.write_text(content)
    over = threading.Event()

    def live() -> None:
        while not over.wait(0.02):
            os.utime(file)

    thread = threading.Thread(target=live)
    thread.start()
    try:
        text = refusal(claim, tmp_path, patience=10)
    finally:
        over.set()
        thread.join()
    who = "process 17 on node17, since" if content is None else "a process)"
    assert f"attempt 1 of this run is going on ({who}" in text


def test_an_owner_elsewhere_that_ends_while_it_is_watched_is_followed(claim: Claim, tmp_path: Path) -> None:
    there = record(scope=ELSEWHERE)
    leave(tmp_path, there)
    claimed = claim(
        tmp_path,
        patience=30,
        log=lambda line: threading.Timer(0.1, leave_atomically, [tmp_path, there]).start(),
    )
    assert claimed.record.attempt == 2


def leave_atomically(folder: Path, found: AttemptRecord) -> None:
    temporary = folder / "ended"
    temporary.write_text(json.dumps(dataclasses.asdict(dataclasses.replace(found, state="stopped"))))
    temporary.replace(path(folder, found.attempt))


WHOLE = dataclasses.asdict(record())
DAMAGED = {
    "empty": "",
    "cut off": json.dumps(WHOLE)[:50],
    "no record": "[]",
    "null": "null",
    "no text": b"\xff\xfe",
    "deep": "[" * 100_000,
    "a field less": {name: value for name, value in WHOLE.items() if name != "lease_id"},
    "a field more": {**WHOLE, "code": "x"},
    **{
        f"{name} {value!r}": {**WHOLE, name: value}
        for name, values in {
            "pid": ["1", True, 1.0, -1, None],
            "started": [None, "0", False],
            "attempt": [[1], 0.5],
            "step": [None, -3],
            "steps": ["3"],
            "epoch": [True],
            "epochs": [{}],
            "state": ["over", None, ["running"]],
            "host": [3, None],
            "pid_namespace": [None, 7],
            "lease_id": [0],
            "began": [0],
            "stage": [None],
        }.items()
        for value in values
    },
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_record_that_is_damaged_is_not_believed(damage: str, tmp_path: Path) -> None:
    content = DAMAGED[damage]
    file = tmp_path / "0001.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        file.write_text(content if isinstance(content, str) else json.dumps(content))
    assert read_record(file) is None
    file.write_text(json.dumps(WHOLE))
    assert read_record(file) == record(token=WHOLE["lease_id"], began=WHOLE["began"])
    assert read_record(tmp_path / "nowhere.json") is None


@pytest.mark.parametrize("damage", ["empty", "cut off", "pid '1'"])
def test_a_damaged_record_is_watched_like_an_owner_elsewhere(
    damage: str, claim: Claim, tmp_path: Path
) -> None:
    # This process lives, and is not believed to be the owner.
    (tmp_path / ATTEMPTS).mkdir()
    content = DAMAGED[damage]
    path(tmp_path).write_text(content if isinstance(content, str) else json.dumps(content))
    said: list[str] = []
    assert claim(tmp_path, patience=0.1, log=said.append).record.attempt == 2
    assert "has left no readable record" in said[0]


# --- what has been taken over


def test_an_attempt_that_was_taken_over_writes_nothing_more(claim: Claim, tmp_path: Path) -> None:
    old = claim(tmp_path)
    old.update(step=3)
    old.check()
    before = path(tmp_path).read_bytes()
    leave(tmp_path, record(attempt=2, host="node17", pid=4711))
    for act in (old.check, lambda: old.update(step=4), lambda: old.end("done")):
        with pytest.raises(UserError) as caught:
            act()
        assert str(caught.value).startswith(
            f"{tmp_path}: attempt 2 on node17, process 4711 has taken this run over from attempt 1, which therefore "
            "writes nothing more."
        )
        assert "end one of the two" in str(caught.value)
    assert path(tmp_path).read_bytes() == before
    assert not old._thread.is_alive(), "nor gives signs of life, once it has tried to end"


@pytest.mark.parametrize("state", ["running", "done", None])
def test_whatever_became_of_the_later_attempt(state: Any, claim: Claim, tmp_path: Path) -> None:
    old = claim(tmp_path)
    later = leave(tmp_path, record(attempt=7, state=state or "done"))
    if state is None:
        later.write_text("")  # it has just begun
    with pytest.raises(UserError, match=r"attempt 7 on |another attempt has taken"):
        old.check()


def test_a_run_that_was_moved_aside_is_no_longer_written_to(claim: Claim, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    old = claim(folder)
    folder.rename(tmp_path / "run.earlier-1")
    with pytest.raises(UserError, match="has taken this run over from attempt 1"):
        old.update(step=9)
    assert not folder.exists(), "nothing is made anew"
    new = claim(folder)
    assert new.record.attempt == old.record.attempt
    before = path(folder).read_bytes()
    for act in (old.check, lambda: old.update(step=9), lambda: old.end("failed", "x")):
        with pytest.raises(
            UserError, match=rf"attempt 1 on .* process {os.getpid()} has taken this run over"
        ):
            act()
    assert path(folder).read_bytes() == before
    new.update(step=1)
    assert read_record(path(folder)) == new.record


# --- what an attempt says of itself


def test_what_has_become_of_it_is_written(claim: Claim, tmp_path: Path) -> None:
    attempt = claim(tmp_path)
    attempt.update(stage="pretrain", step=4, steps=12, epoch=1, epochs=3)
    attempt.update(step=5)
    found = read_record(path(tmp_path))
    assert found is not None
    assert (found.stage, found.step, found.steps, found.epoch, found.epochs) == ("pretrain", 5, 12, 1, 3)
    assert (found.state, found.reason, found.ended) == ("running", None, None)


@pytest.mark.parametrize(
    ("state", "reason", "written"),
    [
        ("done", None, None),
        ("stopped", "SIGTERM", "SIGTERM"),
        ("failed", "no room\n\x1b[31mfor 图\udcff" + "x" * 5000, None),
    ],
)
def test_its_end_is_written_with_its_reason(
    state: Any, reason: str | None, written: str | None, claim: Claim, tmp_path: Path
) -> None:
    attempt = claim(tmp_path)
    attempt.update(step=3)
    attempt.end(state, reason)
    found = read_record(path(tmp_path))
    assert found == attempt.record
    assert (found.state, found.step) == (state, 3)
    assert found.ended is not None
    assert found.ended >= found.began
    if state == "failed":
        assert found.reason is not None
        assert found.reason.startswith("no room")
        assert found.reason.isprintable()
        assert len(found.reason) <= 2000
    else:
        assert found.reason == written
    assert wait_until_released(tmp_path, log=print) == 1


def test_a_full_disk_is_one_sentence(claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attempt = claim(tmp_path)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(lock, "write_text_atomically", full)
    with pytest.raises(
        UserError, match=r"0001\.json: cannot be written \(No space left on device\)\..*make room"
    ):
        attempt.update(step=1)


def test_a_sign_of_life_is_given_until_the_end(
    claim: Claim, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "SECONDS_BETWEEN_SIGNS", 0.01)
    attempt = claim(tmp_path)
    file = path(tmp_path)

    def changes() -> None:
        first = file.stat().st_mtime_ns
        wait_until(lambda: file.stat().st_mtime_ns != first, "a sign of life")

    changes()
    attempt.update(step=1)
    changes()
    # The folder is gone for a while, as over a network: it is no reason to give up.
    (tmp_path / ATTEMPTS).rename(tmp_path / "away")
    time.sleep(0.05)
    (tmp_path / "away").rename(tmp_path / ATTEMPTS)
    changes()
    assert read_record(file) == attempt.record
    attempt.end("stopped", "STOP")
    assert not attempt._thread.is_alive()


def test_two_signs_fit_well_into_the_patience() -> None:
    assert lock.PATIENCE > 3 * lock.SECONDS_BETWEEN_SIGNS


# --- at the same instant

RACER = """
import sys, time
from pathlib import Path
from trainer.run import lock
from trainer.run.lock import RunLock
from trainer.errors import UserError
lock.SECONDS_BETWEEN_SIGNS = 0.05
print("ready", flush=True)
for line in sys.stdin:
    folder, at, hold = line.rstrip("\\n").split("\\t")
    while time.monotonic() < float(at):  # awake: all leave the line at once
        pass
    try:
        attempt = RunLock.acquire(Path(folder), log=lambda line: None, patience=5)
    except UserError as error:
        print("refused", error, flush=True)
        continue
    attempt.check()
    if hold == "end":
        attempt.end("done")
    print("won", attempt.record.attempt, flush=True)
"""
RACERS = 3


@pytest.fixture
def racers() -> Iterator[list[subprocess.Popen[str]]]:
    found = [
        subprocess.Popen(
            [sys.executable, "-c", RACER],
            cwd=REPOSITORY,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for _ in range(RACERS)
    ]
    for racer in found:
        assert racer.stdout is not None
        assert racer.stdout.readline() == "ready\n"
    yield found
    for racer in found:
        racer.kill()
        racer.communicate()


def race(racers: list[subprocess.Popen[str]], folder: Path, hold: str) -> list[str]:
    start = time.monotonic() + 0.02
    for racer in racers:
        assert racer.stdin is not None
        racer.stdin.write(f"{folder}\t{start}\t{hold}\n")
        racer.stdin.flush()
    return [racer.stdout.readline().rstrip("\n") for racer in racers]  # type: ignore[union-attr]


@pytest.mark.parametrize("earlier", [None, "done", "killed"])
def test_of_those_that_start_at_the_same_instant_exactly_one_wins(
    earlier: str | None, racers: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    for number in range(15):
        folder = tmp_path / str(number)
        if earlier is not None:
            leave(folder, record(state="done") if earlier == "done" else record(state="running", started=1))
        said = race(racers, folder, "hold")
        expected = 1 if earlier is None else 2
        assert said.count(f"won {expected}") == 1, said
        winner = racers[said.index(f"won {expected}")]
        others = [line for line in said if not line.startswith("won")]
        assert len(others) == RACERS - 1, said
        for line in others:
            assert f"attempt {expected} of this run is going on (process {winner.pid} on " in line, said
        assert len(list((folder / ATTEMPTS).glob("*.json"))) == expected


def test_no_number_is_given_twice_however_often_they_come_and_go(
    racers: list[subprocess.Popen[str]], tmp_path: Path
) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    numbers: list[int] = []
    for _ in range(25):
        some = chance.sample(racers, chance.randint(2, RACERS))
        said = race(some, tmp_path, "end")
        numbers += [int(line.split()[1]) for line in said if line.startswith("won")]
        assert any(line.startswith("won") for line in said), said
    assert sorted(numbers) == list(range(1, len(numbers) + 1))
    assert len(list((tmp_path / ATTEMPTS).iterdir())) == len(numbers)
