"""Exit codes and last messages of the trainer, as a process of its own and in this process."""

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import MAIN, REPOSITORY
from trainer import cli
from trainer.cli import RESUMES, run_cli, stopped_exit_code
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals
from trainer.errors import UserError
from trainer.main import main

# `trainer/main.py` run by path, as users run it, with a pipeline that needs no torch.
PROGRAM = """
import os, runpy, signal, sys, time, types
from trainer.errors import UserError
from trainer.distributed.signals import Stopped
def run(config, signals):
    print("running", flush=True)
    {run}
for name, attribute in {{"pipeline": "run", "commands.debug": "debug"}}.items():
    stub = types.ModuleType("trainer." + name)
    setattr(stub, attribute, run)
    sys.modules[stub.__name__] = stub
sys.argv = [{main!r}, "--data.root=x"]
runpy.run_path({main!r}, run_name="__main__")
"""
SECOND_CTRL_C = """
with signals.deferred():
    print("training", flush=True)
    while signals.received is None: time.sleep(0.01)
    signals._received_at -= 10  # ten seconds later
    print("saving", flush=True)
    time.sleep(600)"""
# The collector sees a list of the run's own, but not the dictionary of an imported module.
COLLECTED = """
import gc
own = [{}]
tracked = {id(each) for each in gc.get_objects()}
imported = vars(sys.modules["trainer.distributed.signals"])
print(gc.isenabled(), id(own) in tracked, id(imported) in tracked, file=sys.stderr)"""


@contextmanager
def running(run: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start the program, and wait until it calls `run`, whose body is given."""
    without_launcher = {
        name: value for name, value in os.environ.items() if not name.startswith(("ACCELERATE_", "TORCHELASTIC_"))
    }
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(run=run.replace("\n", "\n    "), main=str(MAIN))],
        cwd=REPOSITORY,
        env={**without_launcher, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        expect_line(process, "running")
        yield process
    finally:
        process.kill()
        process.communicate()


def expect_line(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdout is not None
    assert process.stdout.readline() == f"{line}\n"


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code and standard error."""
    _, errors = process.communicate(timeout=60)
    return process.returncode, errors


@pytest.mark.parametrize(
    ("run", "code", "errors"),
    [
        (COLLECTED, 0, "True True False\n"),
        ("error = UserError('a')\nerror.add_note('(nor b)')\nraise error", 2, "error: a\n(nor b)\n"),
        ("raise Stopped('STOP', saved='step 3')", 75, f"stopped by STOP: saved at step 3. {RESUMES}\n"),
        ("1 / 0", 1, "Traceback ...\nZeroDivisionError: division by zero\n"),
    ],
    ids=["done, and imports are not collected", "user error", "stopped", "unexpected error"],
)
def test_exit_code_and_message(run: str, code: int, errors: str) -> None:
    with running(run) as process:
        returned, printed = end(process)
    assert (returned, re.sub(r"(Traceback ).*(\nZ)", r"\1...\2", printed, flags=re.DOTALL)) == (code, errors)


def test_a_signal_before_training_ends_the_program_at_once() -> None:
    with running("time.sleep(600)") as process:
        process.send_signal(signal.SIGUSR2)
        assert end(process) == (75, f"stopped by SIGUSR2: there was nothing new to save. {RESUMES}\n")


def test_a_second_ctrl_c_interrupts_a_run_that_is_saving() -> None:
    with running(SECOND_CTRL_C) as process:
        expect_line(process, "training")
        process.send_signal(signal.SIGINT)
        expect_line(process, "saving")
        process.send_signal(signal.SIGTERM)  # does not interrupt
        process.send_signal(signal.SIGINT)
        code, errors = end(process)
    assert code == 130
    assert errors.startswith("interrupted by a second Ctrl-C: what was saved earlier is intact")
    assert "Traceback" not in errors


def test_a_rank_of_a_group_exits_with_its_code_and_all_of_its_output() -> None:
    with running("print('the last line')\nraise Stopped('SIGTERM')", WORLD_SIZE="2", RANK="0") as process:
        expect_line(process, "the last line")
        assert end(process) == (75, f"stopped by SIGTERM: there was nothing new to save. {RESUMES}\n")


def test_another_rank_prints_nothing_if_the_launcher_ends_it_first() -> None:
    with running("raise UserError('x')", WORLD_SIZE="2", RANK="1") as process:

        def has(mask: str, number: signal.Signals) -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(status.partition(f"{mask}:")[2].split()[0], 16) >> (number - 1) & 1

        def waits_for_the_launcher() -> bool:
            ignores = all(has("SigIgn", number) for number in (signal.SIGINT, signal.SIGHUP))
            return ignores and not (has("SigIgn", signal.SIGTERM) or has("SigCgt", signal.SIGTERM))

        while not waits_for_the_launcher():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)  # an echo
        process.send_signal(signal.SIGTERM)
        assert end(process) == (-signal.SIGTERM, "")


def test_a_stop_counts_as_success_under_torchrun() -> None:
    assert stopped_exit_code({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}) == 0
    assert stopped_exit_code({"ACCELERATE_MIXED_PRECISION": "no"}) == 75
    assert stopped_exit_code({}) == 75


def test_all_ranks_report_errors_and_rank_0_a_stop(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "_SECONDS_FOR_RANK_0", 0.0)
    monkeypatch.setattr(cli, "has_launcher", lambda environment: False)
    handlers = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    for rank, error, code, printed in (
        (0, Stopped("SIGTERM", saved="step 1"), 75, f"stopped by SIGTERM: saved at step 1. {RESUMES}\n"),
        (1, Stopped("SIGTERM"), 75, ""),
        (0, UserError("x"), 2, "error: x\n"),
        (3, UserError("x"), 2, "[rank 3] error: x\n"),
    ):

        def work(signals: StopSignals, error: Exception = error) -> None:
            raise error

        monkeypatch.setenv("RANK", str(rank))
        assert run_cli(work) == code
        assert capsys.readouterr().err == printed
        assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == handlers, "restored"


def test_a_wrong_option_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint.every=often"]) == 2
    assert "error: checkpoint.every is 'often': expected an interval" in capsys.readouterr().err
