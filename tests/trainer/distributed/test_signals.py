"""Stop signals, sent to this process and to processes of their own."""

import os
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.launching import REPOSITORY
from trainer.distributed import signals as signals_module
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals, has_launcher


@pytest.fixture(autouse=True)
def _handlers_are_restored() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    yield
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def send(name: str) -> None:
    os.kill(os.getpid(), getattr(signal, name))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"])
def test_a_deferred_signal_is_recorded_and_others_raise(name: str) -> None:
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


def test_an_error_ends_the_deferral() -> None:
    with StopSignals() as signals:
        with pytest.raises(RuntimeError), signals.deferred():
            raise RuntimeError
        with pytest.raises(Stopped, match="SIGTERM"):
            send("SIGTERM")


def test_an_ignored_signal_stays_ignored() -> None:
    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignals() as signals:
        send("SIGHUP")
        assert signals.received is None
    assert signal.signal(signal.SIGHUP, previous) is signal.SIG_IGN


class RaisesSignal:
    def __del__(self) -> None:
        send("SIGINT")


def drop_in_del() -> None:
    RaisesSignal()


def drop_in_weakref_callback() -> None:
    target: set[int] = set()
    reference = weakref.ref(target, lambda _: send("SIGTERM"))
    del target
    assert reference() is None


@pytest.mark.parametrize(("drop", "name"), [(drop_in_del, "SIGINT"), (drop_in_weakref_callback, "SIGTERM")])
def test_stop_is_raised_again_where_python_drops_exceptions(
    drop: Callable[[], None], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    hook = sys.unraisablehook
    with StopSignals() as signals:
        drop()
        with pytest.raises(Stopped, match=name):
            time.sleep(20)
        assert signals.received == getattr(signal, name)
    with StopSignals() as signals:  # a command that ends first has not been stopped
        drop()
    time.sleep(0.1)
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == "", "no `Exception ignored in`"


def test_forked_worker_without_handlers_of_its_own_ignores_signals() -> None:
    with StopSignals():
        worker = os.fork()
        if worker == 0:
            with suppress(BaseException):
                send("SIGINT")
                os._exit(0)
            os._exit(1)
        assert os.waitpid(worker, 0) == (worker, 0)


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


HEAD = """
import os, signal, subprocess, sys, time
from regraft.parent_death import signal_on_parent_death
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
    pipes: dict[str, int] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    command = [sys.executable, "-c", HEAD + program]
    process = subprocess.Popen(command, cwd=REPOSITORY, text=True, start_new_session=True, **pipes)
    try:
        yield process
    finally:
        for path in Path("/proc").glob("[0-9]*"):
            with suppress(ProcessLookupError):
                if os.getsid(int(path.name)) == process.pid:
                    os.kill(int(path.name), signal.SIGKILL)
        process.communicate()


def read_line(process: subprocess.Popen[str]) -> str:
    return process.stdout.readline().rstrip("\n")  # type: ignore[union-attr]


SIGNALED = """
signal.signal(signal.SIGUSR1, lambda *_: (print("signaled", flush=True), os._exit(0)))
signal_on_parent_death(signal.SIGUSR1)
print("ready", flush=True)
time.sleep(60)
"""
HANGING = """
signals_module.SECONDS_AFTER_LAUNCHER = 0.2
signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # as in code that runs no handler
exit_with_parent()
print("ready", flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize(
    ("child", "last_line"),
    [(SIGNALED, "signaled"), ("exit_with_parent()" + WAIT_FOR_SIGNAL, "saved after SIGTERM"), (HANGING, "")],
    ids=["signal_on_parent_death", "exit_with_parent", "a trainer that hangs"],
)
def test_a_child_ends_when_its_parent_is_killed(child: str, last_line: str) -> None:
    parent = f"subprocess.Popen([sys.executable, '-c', {HEAD + child!r}]).wait()"
    with running(parent) as process:
        assert read_line(process) == "ready"
        start = time.monotonic()
        process.kill()
        assert read_line(process) == last_line, "empty: no process holds the pipe any more"
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
        (folder / name).write_text(f"import subprocess, sys; subprocess.run([sys.executable, {str(child)!r}])")
    launched = {"ACCELERATE_MIXED_PRECISION": "no"}
    shell = ["sh", "-c", f"{sys.executable} {child}; true"]
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    for command, environment, expected in (
        ([sys.executable, str(folder / "accelerate")], launched, True),
        ([sys.executable, str(folder / "accelerate")], {}, False),  # a script of that name that launches nothing
        ([sys.executable, str(folder / "other")], launched, False),
        (shell, launched, False),  # exported in a shell
        (shell, {"TORCHELASTIC_RUN_ID": "x"}, True),
    ):
        output = subprocess.check_output(command, env={**clean, **environment}, text=True, timeout=60)
        assert output == f"{expected}\n", (command, environment)
    assert not has_launcher({})
