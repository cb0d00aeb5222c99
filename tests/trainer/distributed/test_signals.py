"""Signals, sent for real: to this process, and to processes of their own."""

import os
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
from trainer.distributed import signals as module
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals, has_launcher

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


def test_these_are_the_signals_that_ask_a_run_to_stop() -> None:
    assert [number.name for number in STOP_SIGNALS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_while_training_a_signal_is_only_remembered(name: str) -> None:
    with StopSignals() as signals:
        with signals.deferred():
            assert signals.received is None
            send(name)
            assert signals.received == getattr(signal, name)
        assert signals.received == getattr(signal, name), "and is not forgotten"


@pytest.mark.parametrize("name", NAMES)
def test_before_and_after_training_a_signal_ends_the_run_at_once(name: str) -> None:
    with StopSignals() as signals:
        with signals.deferred():
            pass
        with pytest.raises(Stopped) as stopped:
            send(name)
        assert (stopped.value.reason, stopped.value.saved) == (name, None)


def test_an_error_while_training_ends_the_remembering() -> None:
    def fail(signals: StopSignals) -> None:
        with signals.deferred():
            raise RuntimeError

    with StopSignals() as signals:
        with pytest.raises(RuntimeError):
            fail(signals)
        with pytest.raises(Stopped, match="SIGTERM"):
            send("SIGTERM")


def test_handlers_are_restored_after_an_error_too() -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}

    def fail() -> None:
        with StopSignals():
            assert {number: signal.getsignal(number) for number in STOP_SIGNALS} != before
            raise Stopped("x")

    with pytest.raises(Stopped):
        fail()
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            send("SIGHUP")
            assert signals.received is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def test_a_second_ctrl_c_of_a_person_who_will_not_wait_interrupts(clock: SimpleNamespace) -> None:
    with StopSignals() as signals, signals.deferred():
        send("SIGINT")
        for _ in range(3):
            clock.now += 0.33  # a launcher's echo, a key held down
            send("SIGINT")
        clock.now += 0.02
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
        assert signals.received == signal.SIGINT


@pytest.mark.parametrize("first", ["SIGTERM", "SIGUSR1"])
def test_other_signals_never_insist(first: str, clock: SimpleNamespace) -> None:
    with StopSignals() as signals, signals.deferred():
        for name in (first, first, "SIGTERM", "SIGHUP"):
            send(name)
            clock.now += 100
        assert signals.received == getattr(signal, first), "the first one is told"


def test_a_second_signal_does_not_cut_short_what_the_first_began() -> None:
    with StopSignals() as signals:
        with pytest.raises(Stopped, match="SIGTERM"):
            send("SIGTERM")
        send("SIGTERM")
        send("SIGINT")
        assert signals.received == signal.SIGTERM


# --- processes of their own

PROGRAM_HEAD = """
import os, signal, subprocess, sys, threading, time
from trainer.distributed import signals as module
from trainer.distributed.signals import *
from trainer.distributed.signals import end_with_parent, exit_with_parent, has_launcher
"""


@contextmanager
def running(
    program: str, *before: str, environment: dict[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a session of its own, which is killed at the end, whoever is left of it."""
    process = subprocess.Popen(
        [*before, sys.executable, "-c", PROGRAM_HEAD + program],
        cwd=REPOSITORY,
        env={**os.environ, **(environment or {})},
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for line in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = line.read_text().partition(" (")
                session = int(rest.rpartition(")")[2].split()[3])
            except (OSError, ValueError):
                continue
            if session == process.pid:
                os.kill(int(pid), signal.SIGKILL)
        process.communicate()


def line_of(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_another_process_is_stopped_by_each_signal_as_a_flag_and_at_once() -> None:
    program = """
for flags in (True, False):
    for _ in STOP_SIGNALS:
        with StopSignals() as signals:
            try:
                if flags:
                    with signals.as_flags():
                        print("training", flush=True)
                        while signals.asked is None:
                            time.sleep(0.01)
                        print("boundary", signal.Signals(signals.asked).name, flush=True)
                else:
                    print("preparing", flush=True)
                    time.sleep(60)
            except Stopped as stopped:
                print("stopped", stopped.reason, flush=True)
"""
    with running(program) as process:
        for doing, answer in (("training", "boundary"), ("preparing", "stopped")):
            for name in NAMES:
                assert line_of(process) == doing
                process.send_signal(getattr(signal, name))
                assert line_of(process) == f"{answer} {name}"
        assert process.wait(timeout=30) == 0


def test_what_nohup_started_outlives_its_terminal() -> None:
    program = """
with StopSignals() as signals, signals.as_flags():
    os.kill(os.getpid(), signal.SIGHUP)
    print(signals.asked, flush=True)
"""
    with running(program, "nohup") as process:
        said, _ = process.communicate(timeout=30)
    assert said.splitlines()[-1] == "None"


CHILD_OF = """
child = subprocess.Popen([sys.executable, "-c", {child!r}])
child.wait()
"""


def test_a_process_gets_its_signal_when_its_parent_is_killed() -> None:
    child = PROGRAM_HEAD + (
        "signal.signal(signal.SIGUSR1, lambda number, frame: (print('told', flush=True), os._exit(0)))\n"
        "end_with_parent(signal.SIGUSR1)\n"
        "print('ready', os.getpid(), flush=True)\n"
        "time.sleep(60)\n"
    )
    with running(CHILD_OF.format(child=child)) as parent:
        ready, pid = line_of(parent).split()
        assert ready == "ready"
        assert Path(f"/proc/{pid}").exists()
        parent.kill()
        assert line_of(parent) == "told"


def test_a_trainer_whose_launcher_is_killed_is_asked_to_stop() -> None:
    child = PROGRAM_HEAD + (
        "with StopSignals() as signals, signals.as_flags():\n"
        "    follow_launcher()\n"
        "    print('ready', flush=True)\n"
        "    while signals.asked is None:\n"
        "        time.sleep(0.01)\n"
        "    print('saved after', signal.Signals(signals.asked).name, flush=True)\n"
    )
    with running(CHILD_OF.format(child=child)) as parent:
        assert line_of(parent) == "ready"
        parent.kill()
        assert line_of(parent) == "saved after SIGTERM"


def test_a_trainer_that_hangs_does_not_outlive_its_launcher_for_long() -> None:
    child = PROGRAM_HEAD + (
        "module.SECONDS_TO_OUTLIVE = 0.2\n"
        "with StopSignals() as signals, signals.as_flags():\n"
        "    signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as in code that lets no handler run\n"
        "    follow_launcher()\n"
        "    print('ready', flush=True)\n"
        "    time.sleep(600)\n"
        "    print('slept', flush=True)\n"
    )
    with running(CHILD_OF.format(child=child)) as parent:
        assert line_of(parent) == "ready"
        began = time.monotonic()
        parent.kill()
        assert line_of(parent) == "", "the end: nobody holds its output any more"
        assert time.monotonic() - began < 30


def test_a_launcher_is_told_from_a_shell(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Neither folder nor command of the shell may say what is looked for.
    folder = tmp_path_factory.mktemp("parents")
    assert "accelerate" not in str(folder)
    asks = folder / "asks.py"
    asks.write_text(
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from trainer.distributed.signals import has_launcher; print(has_launcher(os.environ))"
    )
    for name in ("accelerate", "launches"):
        (folder / name).write_text(
            f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(asks)!r}]).returncode)"
        )
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    python, shell = sys.executable, ["sh", "-c", f"{sys.executable} {asks}; true"]
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for command, environment, expected in (
        ([python, str(folder / "accelerate")], launched, True),
        ([python, str(folder / "accelerate")], {}, False),  # a script of that name, which launches nothing
        ([python, str(folder / "launches")], launched, False),
        (shell, launched, False),  # exported by somebody
        (shell, {"TORCHELASTIC_RUN_ID": "x"}, True),
    ):
        said = subprocess.run(
            command, env={**alone, **environment}, text=True, capture_output=True, check=True, timeout=60
        )
        assert said.stdout == f"{expected}\n", (command, environment)
    assert not has_launcher({})
