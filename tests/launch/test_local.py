"""`regraft train` with real processes: torchrun, two ranks, signals and kills from outside."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.local import run as local
from launch.local.command import Local
from launch.local.torchrun import Ended
from tests.kills import (
    EXAMPLES,
    Run,
    attempts,
    catches,
    children,
    options,
    pictures,
    require_each_once,
    saved_step,
    started,
)
from tests.launching import MAIN, REPOSITORY
from trainer.attempts import Attempt
from trainer.failure import ERROR_FILE, write_error_file

pytestmark = pytest.mark.slow
LONG = 400
"""Epochs of a run that nobody waits for."""


def regraft(*words: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *words]


def cmdline(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8")
    except OSError:
        return ""


def agent(run: Run) -> int:
    (found,) = (pid for pid in children(run.process.pid) if "torch.distributed.run" in cmdline(pid))
    return found


def ranks(run: Run) -> list[int]:
    return sorted(pid for pid in children(agent(run)) if str(MAIN) in cmdline(pid))


@contextmanager
def training(
    factory: pytest.TempPathFactory, *words: str, epochs: int = LONG, folder: Path | None = None
) -> Iterator[Run]:
    """Start two ranks through `regraft train`, and wait until they have made two updates."""
    folder = folder or factory.mktemp("local") / "run"
    trainers = options(pictures(factory), folder, data__workers=0, train__epochs=epochs)
    with started(regraft("train", "--nproc", "2", *words, *trainers), folder) as run:
        run.wait_for_step(2)
        yield run


def test_a_run_shows_rank_0_and_keeps_what_each_rank_said(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("local") / "run"
    trainers = options(pictures(tmp_path_factory), folder, data__workers=0, train__epochs=1)
    with started(regraft("train", "--nproc", "2", *trainers), folder) as run:
        said = run.end(code=0)
    assert said.count(f"{EXAMPLES} of {EXAMPLES} trained on in every epoch") == 1
    assert "W1" not in said, "torchrun's own words are in its log alone"
    require_each_once(folder, epochs=1)
    logs = folder / "logs" / "0001"
    assert "trained on in every epoch" in (logs / "rank-0.log").read_text()
    assert [path.parent.name for path in sorted(logs.glob("*/attempt_0/*/stdout.log"))] == ["1"]
    shown = subprocess.run(
        regraft("status", str(folder)), cwd=REPOSITORY, capture_output=True, text=True, check=True
    ).stdout
    assert f"{folder}: done" in shown
    assert "step 6 of 6, epoch 1 of 1" in shown

    # Started anew, the earlier run is moved aside, and this start's logs stay in their place.
    with started(regraft("train", *trainers, "--run.resume=never"), folder) as run:
        run.end(code=0)
    aside = folder.with_name("run.earlier-1")
    assert (aside / "logs" / "0001" / "rank-0.log").exists()
    assert "moved to" in (folder / "logs" / "0002" / "rank-0.log").read_text()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
def test_a_signal_is_passed_on_once_and_the_run_saved(
    number: signal.Signals, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with training(tmp_path_factory) as run:
        os.kill(run.process.pid, number)
        said = run.end(code=75)
    (record,) = attempts(run.folder)
    assert (record["state"], record["reason"]) == ("stopped", "SIGTERM")
    assert record["step"] == saved_step(run.folder)
    assert f"stopped by {number.name}: saved after step {record['step']} of" in said
    assert "Traceback" not in said


def test_a_second_ctrl_c_ends_at_once_what_does_not_listen(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory) as run:
        for pid in ranks(run):
            os.kill(pid, signal.SIGSTOP)  # a rank that hears nothing
        run.process.send_signal(signal.SIGINT)
        time.sleep(1.5)  # a second one sooner than a second is taken for an echo
        run.process.send_signal(signal.SIGINT)
        assert "ended at once" in run.end(code=130, seconds=20)


def test_no_process_outlives_a_launcher_that_is_killed(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory) as run:
        run.process.kill()
        took = run.require_gone(40)
    print(f"all gone {took:.1f} s after SIGKILL to the launcher")
    (record,) = attempts(run.folder)
    assert record["state"] == "stopped"
    assert record["step"] == saved_step(run.folder)


def test_a_rank_that_is_killed_is_told_of_and_the_run_goes_on(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with training(tmp_path_factory, "--max-restarts", "1", epochs=8) as run:
        os.kill(ranks(run)[1], signal.SIGKILL)
        said = run.end(code=0)
    assert re.findall(r"^failed: rank (\d) on \S+: (.*)$", said, flags=re.M) == [("1", "killed by SIGKILL")]
    assert "started again" in said
    assert "gloo" not in said, "the others' echo stays in the log"
    assert [record["state"] for record in attempts(run.folder)][-1] == "done"
    require_each_once(run.folder, epochs=8)


def test_a_failure_that_is_not_started_again_is_told_with_its_log(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with training(tmp_path_factory) as run:
        os.kill(ranks(run)[0], signal.SIGKILL)
        said = run.end(code=1)
    assert re.findall(r"^failed: rank (\d) on \S+: (.*)$", said, flags=re.M) == [("0", "killed by SIGKILL")]
    (log,) = re.findall(r"^log: (.*)$", said, flags=re.M)
    assert Path(log).is_relative_to(run.folder / "logs" / "0001")
    assert Path(log).is_file()
    assert re.search(r"^try: .*memory", said, flags=re.M)


def test_what_the_user_has_to_mend_is_not_started_again(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("local") / "run"
    trainers = options(pictures(tmp_path_factory), folder, data__root="/nowhere", data__workers=0)
    with started(regraft("train", "--nproc", "2", "--max-restarts", "3", *trainers), folder) as run:
        said = run.end(code=2)
    assert [line for line in said.splitlines() if "error" in line] == [
        line for line in said.splitlines() if line.startswith("error: data.root is '/nowhere'")
    ]
    assert "started again" not in said
    assert len(attempts(folder)) == 1

    misspelt = folder.with_name("other")
    with started(regraft("train", f"--run.dir={misspelt}", "--optim.lrr=1"), misspelt) as run:
        said = run.end(code=2)
    assert said.startswith("error: command line: there is no option 'optim.lrr'")
    assert not misspelt.exists(), "a command that was wrong leaves nothing behind"


def test_two_runs_at_once_do_not_meet_and_a_second_start_of_one_is_refused(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with training(tmp_path_factory) as first, training(tmp_path_factory) as second:
        again = options(pictures(tmp_path_factory), first.folder, data__workers=0, train__epochs=LONG)
        with started(regraft("train", *again), first.folder) as third:
            assert "is going on" in third.end(code=2)
        for run in (first, second):
            assert all(catches(pid, signal.SIGTERM) for pid in ranks(run))
            run.process.terminate()
        for run in (first, second):
            run.end(code=75)
            assert [row["state"] for row in attempts(run.folder)] == ["stopped"]


def test_an_echo_of_another_ranks_failure_is_no_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, logs = tmp_path / "run", tmp_path / "run" / "logs" / "0001"

    def fails(*_: object, **__: object) -> Ended:
        error = logs / "id" / "attempt_0" / "1" / "error.json"
        error.parent.mkdir(parents=True)
        write_error_file(ValueError("no such layer"), {ERROR_FILE: str(error), "RANK": "1"})
        Attempt.claim(run, say=print).end("stopped", "SIGTERM")  # torchrun's, to the others
        return Ended(1, None)

    monkeypatch.setattr(local, "run_agent", fails)
    spec = Local(processes=2, threads=1, max_restarts=0, trainer=tmp_path, options=(), logs=logs)
    assert local.run(spec, run) == 1
    assert "rank 1" in (said := capsys.readouterr().err)
    assert "ValueError: no such layer" in said
