"""Stop signals, sent to this process and to processes of their own."""

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
from trainer.distributed import signals as signals_module
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals, has_launcher

NAMES = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


def handlers() -> dict[signal.Signals, object]:
    return {number: signal.getsignal(number) for number in STOP_SIGNALS}


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = handlers()
    yield
    assert handlers() == before


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", NAMES)
def test_a_deferred_signal_is_recorded_and_others_raise(name: str) -> None:
    assert [number.name for number in STOP_SIGNALS] == NAMES
    with StopSignals() as signals:
        with signals.deferred():
            assert signals.received is None
            send(name)
        assert signals.received == getattr(signal, name)
    with StopSignals() as signals:
        with pytest.raises(Stopped) as stopped:
            send(name)
        assert (stopped.value.reason, stopped.value.saved) == (name, None)
        send("SIGTERM")  # does not interrupt what the first signal has started
        send("SIGINT")
        assert signals.received == getattr(signal, name)


def test_an_error_ends_the_deferral_and_restores_the_handlers() -> None:
    before = handlers()

    def fail(signals: StopSignals) -> None:
        with signals.deferred():
            raise RuntimeError

    with StopSignals() as signals:
        assert handlers() != before
        with pytest.raises(RuntimeError):
            fail(signals)
        with pytest.raises(Stopped, match="SIGTERM"):
            send("SIGTERM")
    assert handlers() == before


def test_an_ignored_signal_stays_ignored() -> None:
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
    monkeypatch.setattr(signals_module, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_ctrl_c_interrupts_a_stopping_run_after_a_second(first: str, clock: SimpleNamespace) -> None:
    with StopSignals() as signals, signals.deferred():
        send(first)
        for name in (first, "SIGTERM", "SIGINT"):
            clock.now += 0.33  # a launcher forwards it again, or the key is held down
            send(name)
        clock.now += 0.02
        for name in ("SIGTERM", "SIGHUP"):
            send(name)
        with pytest.raises(KeyboardInterrupt):
            send("SIGINT")
        assert signals.received == getattr(signal, first)


# --- other processes

HEAD = """
import os, signal, subprocess, sys, time
from regraft.contract import signal_on_parent_death
from trainer.distributed import signals as signals_module
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals, exit_with_parent
"""
WAIT_FOR_SIGNAL = """
with StopSignals() as signals, signals.deferred():
    print("ready", flush=True)
    while signals.received is None:
        time.sleep(0.01)
    print("saved after", signal.Signals(signals.received).name, flush=True)
"""


@contextmanager
def running(program: str) -> Iterator[subprocess.Popen[str]]:
    """Run a program in a session of its own; kill the whole session at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", HEAD + program],
        cwd=REPOSITORY,
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        yield process
    finally:
        for path in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = path.read_text().partition(" (")
                session = int(rest.rpartition(")")[2].split()[3])
            except (OSError, ValueError):
                continue
            if session == process.pid:
                os.kill(int(pid), signal.SIGKILL)
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().rstrip("\n")


def test_another_process_is_stopped_by_each_signal() -> None:
    program = """
for deferred in (True, False):
    for _ in STOP_SIGNALS:
        with StopSignals() as signals:
            try:
                if deferred:
                    with signals.deferred():
                        print("training", flush=True)
                        while signals.received is None:
                            time.sleep(0.01)
                        print("received", signal.Signals(signals.received).name, flush=True)
                else:
                    print("preparing", flush=True)
                    time.sleep(60)
            except Stopped as stopped:
                print("stopped", stopped.reason, flush=True)
"""
    with running(program) as process:
        for phase, answer in (("training", "received"), ("preparing", "stopped")):
            for name in NAMES:
                assert read_line(process) == phase
                process.send_signal(getattr(signal, name))
                assert read_line(process) == f"{answer} {name}"
        assert process.wait(timeout=30) == 0


@pytest.mark.parametrize(
    ("child", "last_line"),
    [
        (
            "signal.signal(signal.SIGUSR1, lambda *_: (print('signaled', flush=True), os._exit(0)))\n"
            "signal_on_parent_death(signal.SIGUSR1)\n"
            "print('ready', flush=True)\n"
            "time.sleep(60)\n",
            "signaled",
        ),
        ("exit_with_parent()" + WAIT_FOR_SIGNAL, "saved after SIGTERM"),
        (
            "signals_module.SECONDS_AFTER_LAUNCHER = 0.2\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as in code that runs no handler\n"
            "exit_with_parent()\n"
            "print('ready', flush=True)\n"
            "time.sleep(600)\n",
            "",  # it ends: no process holds the pipe any more
        ),
    ],
    ids=["signal_on_parent_death", "exit_with_parent", "a trainer that hangs"],
)
def test_a_child_ends_when_its_parent_is_killed(child: str, last_line: str) -> None:
    parent = f"subprocess.Popen([sys.executable, '-c', {HEAD + child!r}]).wait()"
    with running(parent) as process:
        assert read_line(process) == "ready"
        start = time.monotonic()
        process.kill()
        assert read_line(process) == last_line
        assert time.monotonic() - start < 30


def test_a_launcher_is_told_from_a_shell(tmp_path_factory: pytest.TempPathFactory) -> None:
    # Neither folder nor command of the shell may contain "accelerate".
    folder = tmp_path_factory.mktemp("parents")
    assert "accelerate" not in str(folder)
    child = folder / "child.py"
    child.write_text(
        f"import os, sys; sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "from trainer.distributed.signals import has_launcher; print(has_launcher(os.environ))"
    )
    for name in ("accelerate", "other"):
        (folder / name).write_text(
            f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, {str(child)!r}]).returncode)"
        )
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    python, shell = sys.executable, ["sh", "-c", f"{sys.executable} {child}; true"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for command, environment, expected in (
        ([python, str(folder / "accelerate")], launched, True),
        ([python, str(folder / "accelerate")], {}, False),  # a script of that name that launches nothing
        ([python, str(folder / "other")], launched, False),
        (shell, launched, False),  # exported in a shell
        (shell, {"TORCHELASTIC_RUN_ID": "x"}, True),
    ):
        done = subprocess.run(
            command, env={**clean, **environment}, text=True, capture_output=True, check=True, timeout=60
        )
        assert done.stdout == f"{expected}\n", (command, environment)
    assert not has_launcher({})
