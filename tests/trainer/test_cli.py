"""What the program says at its end, and its exit code: the real one, around a run of the tests' own."""

import os
import signal
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.launching import MAIN, REPOSITORY
from trainer import main as module
from trainer.distributed.signals import STOP_SIGNALS, Stopped, StopSignals
from trainer.errors import UserError
from trainer.main import main, stopped_exit_code

# `trainer/main.py` run by path, as its users do; what it calls stands in `run`, and needs no torch.
PROGRAM = """
import os, runpy, signal, sys, time, types
from trainer.errors import UserError
from trainer.distributed.signals import Stopped
stages = types.ModuleType("trainer.pipeline")
def run(config, signals):
    print("running", flush=True)
    {run}
stages.run = run
sys.modules["trainer.pipeline"] = stages
sys.argv = [{main!r}, "--data.root=x"]
runpy.run_path({main!r}, run_name="__main__")
"""


@contextmanager
def running(run: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """Start the program, and come to where it runs."""
    alone = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "TORCHELASTIC_"))}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM.format(run=run.replace("\n", "\n    "), main=str(MAIN))],
        cwd=REPOSITORY,
        env={**alone, **environment},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "running\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def end(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Return the exit code, and what was said on standard error."""
    _, said = process.communicate(timeout=60)
    return process.returncode, said


GOES_ON = "The same command (without --run.resume never) goes on from the run folder's newest checkpoint\n"


@pytest.mark.parametrize(
    ("run", "code", "said"),
    [
        ("pass", 0, ""),
        ("raise UserError('a, not b: do c')", 2, "error: a, not b: do c\n"),
        (
            "error = UserError('a')\nerror.add_note('(nor b)')\nraise error",
            2,
            "error: a\n(nor b)\n",
        ),
        (
            "raise Stopped('the file STOP', saved='step 3 of 6')",
            75,
            f"stopped by the file STOP: saved at step 3 of 6. {GOES_ON}",
        ),
    ],
)
def test_how_a_run_ended_is_its_exit_code(run: str, code: int, said: str) -> None:
    with running(run) as process:
        assert end(process) == (code, said)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR2"])
def test_a_signal_before_training_ends_the_program_at_once(name: str) -> None:
    with running("time.sleep(600)") as process:
        process.send_signal(getattr(signal, name))
        assert end(process) == (75, f"stopped by {name}: there was nothing new to save. {GOES_ON}")


def test_a_person_who_will_not_wait_is_heard() -> None:
    run = (
        "with signals.as_flags():\n"
        "    print('training', flush=True)\n"
        "    while signals.asked is None: time.sleep(0.01)\n"
        "    signals._when -= 10  # ten seconds later\n"
        "    print('saving', flush=True)\n"
        "    time.sleep(600)"
    )
    with running(run) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "training\n"
        process.send_signal(signal.SIGINT)
        assert process.stdout.readline() == "saving\n"
        process.send_signal(signal.SIGTERM)  # nothing of the kind
        process.send_signal(signal.SIGINT)
        code, said = end(process)
    assert code == 130
    assert said.startswith("interrupted before the state could be saved: what the run folder holds is whole")
    assert "Traceback" not in said


def test_an_error_of_ours_has_a_traceback_and_its_own_code() -> None:
    with running("1 / 0") as process:
        code, said = end(process)
    assert code == 1
    assert said.startswith("Traceback")
    assert said.endswith("ZeroDivisionError: division by zero\n")


def test_one_of_a_group_leaves_with_its_code_and_all_that_it_said() -> None:
    with running("print('the last line')\nraise Stopped('SIGTERM')", WORLD_SIZE="2", RANK="0") as process:
        assert process.stdout is not None
        assert process.stdout.read() == "the last line\n"
        code, said = end(process)
    assert code == 75
    assert "stopped by SIGTERM" in said


def test_another_rank_is_silent_if_the_launcher_ends_it_since_rank_0_has_spoken() -> None:
    with running("raise UserError('x')", WORLD_SIZE="2", RANK="1") as process:

        def has(mask: str, number: signal.Signals) -> int:
            status = Path(f"/proc/{process.pid}/status").read_text()
            return int(status.partition(f"{mask}:")[2].split()[0], 16) >> (number - 1) & 1

        def at_its_last_words() -> bool:
            ignores = all(has("SigIgn", number) for number in (signal.SIGINT, signal.SIGHUP))
            return ignores and not (has("SigIgn", signal.SIGTERM) or has("SigCgt", signal.SIGTERM))

        while not at_its_last_words():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)  # an echo
        process.send_signal(signal.SIGTERM)
        assert end(process) == (-signal.SIGTERM, "")


def test_torchrun_knows_success_and_failure_alone() -> None:
    assert stopped_exit_code({"TORCHELASTIC_RUN_ID": "none", "RANK": "0"}) == 0
    assert stopped_exit_code({"ACCELERATE_MIXED_PRECISION": "no"}) == 75
    assert stopped_exit_code({}) == 75


# --- in this process

Ends = Callable[..., tuple[int, str]]


@pytest.fixture
def ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Ends:
    """Return code and words of a run on some rank that ends with such an error."""

    def ends(error: BaseException, rank: str) -> tuple[int, str]:
        def run(config: object, signals: StopSignals) -> None:
            raise error

        stages = types.ModuleType("trainer.pipeline")
        stages.run = run  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "trainer.pipeline", stages)
        monkeypatch.setattr(module, "_SECONDS_FOR_RANK_0", 0.0)
        monkeypatch.setattr(module, "has_launcher", lambda environment: False)
        monkeypatch.setenv("RANK", rank)
        return main(["--data.root=x"]), capsys.readouterr().err

    return ends


def test_what_was_imported_is_left_out_of_collections_that_go_on() -> None:
    # A list of the run's own is seen by the collector, a module's dictionary is not.
    seen = """
import gc
own = [{}]
tracked = {id(one) for one in gc.get_objects()}
signals = vars(sys.modules['trainer.distributed.signals'])
print(gc.isenabled(), id(own) in tracked, id(signals) in tracked, file=sys.stderr)"""
    with running(seen) as process:
        assert end(process) == (0, "True True False\n")


def test_all_ranks_stop_together_and_one_says_so(ends: Ends) -> None:
    assert ends(Stopped("SIGTERM", saved="the end of epoch 1 of 2"), "0") == (
        75,
        f"stopped by SIGTERM: saved at the end of epoch 1 of 2. {GOES_ON}",
    )
    assert ends(Stopped("SIGTERM"), "1") == (75, "")


def test_a_rank_that_fails_alone_says_who_it_is(ends: Ends) -> None:
    assert ends(UserError("x"), "0") == (2, "error: x\n")
    assert ends(UserError("x"), "3") == (2, "[rank 3] error: x\n")
    assert ends(KeyboardInterrupt(), "3")[1].startswith("[rank 3] interrupted")


def test_the_callers_handlers_are_restored(ends: Ends) -> None:
    before = {number: signal.getsignal(number) for number in STOP_SIGNALS}
    ends(UserError("x"), "0")
    assert {number: signal.getsignal(number) for number in STOP_SIGNALS} == before


def test_a_wrong_option_is_a_user_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoint.every=often"]) == 2
    assert "error: checkpoint.every is 'often': expected an interval" in capsys.readouterr().err
