"""Stop signals before a command has handlers of its own, and after it has ended."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch import cli
from regraft.contract import STOPPED
from tests.launching import REPOSITORY
from tests.slurm.jobs import with_sitecustomize

STOPPED_AT_START = "stopped by {}: nothing was done yet. Run the same command again\n"
SIGNAL_WHEN_PYTHON_STARTS = """\
import os, signal, sys
if any("trainer/" in word for word in sys.orig_argv):
    os.kill(os.getpid(), signal.SIGINT)
"""
IMPORTING = """\
import os, signal, sys
from regraft.startup_signals import exit_on_signals
number = signal.Signals[sys.argv[1]]
signal.signal(signal.SIGHUP, signal.SIG_IGN)
exit_on_signals()
os.kill(os.getpid(), number)
print("goes on")
"""
ENDED = """\
import os, signal, sys
from regraft.startup_signals import exit_on_signals
exit_on_signals()
if sys.argv[1] == "trainer":
    from trainer.cli import run_cli
    code = run_cli(lambda signals: None)
else:
    from launch.cli import main
    code = main(["--version"])
for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    os.kill(os.getpid(), number)
sys.exit(code)
"""
EXITING = """\
import os, signal, sys, threading, time
from regraft.startup_signals import exit_on_signals
exit_on_signals()
from trainer.cli import exit_process

class Last:
    def __del__(self, kill=os.kill, pid=os.getpid()):
        kill(pid, signal.SIGTERM)

if sys.argv[1] == "hangs":
    threading.Thread(target=time.sleep, args=(60,)).start()
    threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
else:
    last = Last()
exit_process(3)
"""


def run_script(script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, env = [sys.executable, "-c", script, *arguments], {**os.environ, **environment}
    return subprocess.run(command, env=env, cwd=REPOSITORY, capture_output=True, text=True, check=False, timeout=60)


def test_signal_while_the_programs_of_the_trainer_start_is_one_sentence(tmp_path: Path) -> None:
    """Each verb replaces the launcher's process by Python, which has the traceback of KeyboardInterrupt until then."""
    environment = {**os.environ, **with_sitecustomize(tmp_path / "site", SIGNAL_WHEN_PYTHON_STARTS)}
    environment["PYTHONPATH"] += f"{os.pathsep}{REPOSITORY}"
    verbs = sorted(set(cli.VERBS) - {"train", "submit", "render", "status", "doctor", "completion"})
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    commands = [[sys.executable, "-m", "regraft", verb] for verb in verbs]
    processes = [subprocess.Popen(command, env=environment, cwd=tmp_path, text=True, **pipes) for command in commands]
    for verb, process in zip(verbs, processes, strict=True):
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out, err) == (STOPPED, "", STOPPED_AT_START.format("SIGINT")), verb


def test_signal_during_the_imports_ends_a_program_with_one_sentence() -> None:
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        done = run_script(IMPORTING, name)
        assert (done.returncode, done.stdout, done.stderr) == (STOPPED, "", STOPPED_AT_START.format(name))
    assert run_script(IMPORTING, "SIGHUP").stdout == "goes on\n", "nohup ignores it"
    done = run_script(IMPORTING, "SIGTERM", RANK="1", TORCHELASTIC_RUN_ID="none")
    assert (done.returncode, done.stderr) == (0, ""), "torchrun restarts after other codes"


@pytest.mark.parametrize("package", ["trainer", "launch"])
def test_signal_after_the_command_does_not_change_how_it_ended(package: str) -> None:
    done = run_script(ENDED, package)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("exit_", ["hangs", "ends"])
def test_signal_during_the_exit_keeps_the_exit_code_and_ends_an_exit_that_hangs(exit_: str) -> None:
    start = time.monotonic()
    done = run_script(EXITING, exit_)
    assert (done.returncode, done.stderr) == (3, "")
    assert time.monotonic() - start < 50


def test_constants_agree() -> None:
    assert os.EX_TEMPFAIL == STOPPED
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler, "only a program calls exit_on_signals"
