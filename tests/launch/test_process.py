"""Processes that the launcher starts: they end at a time limit, at a signal, and with their descendants."""

import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from launch.interrupts import Interrupted, interruptible
from launch.local import process
from launch.local.process import ProcessResult, run_trainer_program, run_with_timeout
from tests.launch.helpers import marked_processes
from tests.launching import REPOSITORY


def test_process_is_killed_at_its_time_limit_with_its_descendants(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "_GRACE_SECONDS", 0.5)
    ignores_sigterm = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(600)"
    child = f"subprocess.Popen([sys.executable, '-c', {ignores_sigterm!r}], start_new_session=True)"
    command = [sys.executable, "-c", f"import subprocess, sys; {child}.wait()"]
    mark = str(uuid.uuid4())
    result = run_with_timeout(command, seconds=2.0, environment={**os.environ, "REGRAFT_TEST_MARK": mark})
    assert result.code is None
    assert result.failure_reason(2.0) == "not finished after 2 s (it printed nothing)"
    assert marked_processes(mark) == []
    for code, stderr, reason in (
        (0, "Error: x", None),
        (3, "a\nValueError: b\nend\n", "exit code 3: ValueError: b"),
        (3, "a\nb\n", "exit code 3: b"),
    ):
        assert ProcessResult(code=code, stdout="", stderr=stderr).failure_reason(1) == reason, "the last error"


def test_signal_while_a_process_is_started_ends_it() -> None:
    """Python drops an exception that a handler raises in a function of os.register_at_fork."""
    mark = str(uuid.uuid4())
    script = (
        "import os, signal, sys\n"
        "from launch.local.process import run_with_timeout\n"
        "os.register_at_fork(after_in_parent=lambda: os.kill(os.getpid(), signal.SIGINT))\n"
        "try:\n"
        "    run_with_timeout([sys.executable, '-c', 'import time; time.sleep(60)'], seconds=50)\n"
        "except KeyboardInterrupt:\n"
        "    print('interrupted', signal.pthread_sigmask(signal.SIG_BLOCK, ()))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "REGRAFT_TEST_MARK": mark}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("interrupted set()\n", "")
    assert marked_processes(mark) == []


def test_program_of_the_trainer_stops_with_the_launcher(tmp_path: Path) -> None:
    program, done = tmp_path / "program.py", tmp_path / "done"
    program.write_text(
        "import os, pathlib, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: sys.exit(pathlib.Path({str(done)!r}).touch()))\n"
        "signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(Interrupted, match="SIGINT"), interruptible():
        run_trainer_program(program, ())
    assert done.exists(), "it could clean up"
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()


def test_started_process_blocks_no_signals_and_a_failed_start_leaves_none_blocked() -> None:
    blocked = "import signal; print(signal.pthread_sigmask(signal.SIG_BLOCK, ()))"
    assert run_with_timeout([sys.executable, "-c", blocked], seconds=30).stdout == "set()\n"
    with pytest.raises(OSError, match="nonexistent"):
        run_with_timeout(["/nonexistent"], seconds=30)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()
