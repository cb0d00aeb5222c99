"""`regraft train` with real processes: torchrun, two ranks, signals and kills."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from launch.interrupts import Interrupted, interruptible
from launch.local import run as local_run
from launch.local.torchrun import TorchrunConfig, TorchrunResult
from tests import runs
from tests.launching import REPOSITORY
from trainer.distributed.error_file import ERROR_FILE, write_error_file
from trainer.run.lock import RunLock

pytestmark = pytest.mark.slow
MANY_EPOCHS = 400
"""Epochs of a run that is never trained to its end."""
FAILURE = re.compile(r"^failed: rank (\d) on \S+: (.*)$", flags=re.MULTILINE)


def regraft(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "launch.cli", *arguments]


@contextmanager
def training(factory: pytest.TempPathFactory, *arguments: str) -> Iterator[runs.Run]:
    """Start two ranks with `regraft train`, and wait until they have made two updates."""
    folder = factory.mktemp("local") / "run"
    trainer_options = runs.options(factory, folder, data__num_workers=0, train__epochs=MANY_EPOCHS)
    with runs.start(regraft("train", "--nproc", "2", *arguments, *trainer_options), folder) as run:
        run.wait_for_step(2)
        yield run


def test_output_of_rank_0_is_shown_and_that_of_all_ranks_is_logged(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("local") / "run"
    trainer_options = runs.options(tmp_path_factory, folder, data__num_workers=0, train__epochs=1)
    output = runs.finish(regraft("train", "--nproc", "2", *trainer_options), folder)
    assert output.count(f"{runs.EXAMPLES} of {runs.EXAMPLES} trained on") == 1
    assert "W1" not in output, "messages of torchrun are only in its log"
    runs.assert_each_example_once(folder, epochs=1)
    logs = folder / "logs" / "0001"
    assert "trained on" in (logs / "rank-0.log").read_text()
    assert [path.parent.name for path in sorted(logs.glob("*/attempt_0/*/stdout.log"))] == ["1"]
    status = subprocess.check_output(regraft("status", str(folder)), cwd=REPOSITORY, text=True)
    assert f"{folder}: done" in status
    assert "step 6 of 6, epoch 1 of 1" in status

    # With --run.resume=never the run is archived; the logs of the new launch stay in place.
    runs.finish(regraft("train", *trainer_options, "--run.resume=never"), folder)
    archived = folder.with_name("run.earlier-1")
    assert (archived / "logs" / "0001" / "rank-0.log").exists()
    assert "was archived as" in (folder / "logs" / "0002" / "rank-0.log").read_text()


def test_two_runs_are_independent_and_saved_by_forwarded_signals(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory) as first, training(tmp_path_factory) as second:
        for run, name in ((first, "SIGINT"), (second, "SIGUSR1")):
            run.process.send_signal(getattr(signal, name))
            output = run.end(code=75)
            (record,) = runs.attempts(run.folder)
            assert (record["state"], record["reason"]) == ("stopped", "SIGTERM")
            assert record["step"] == runs.saved_step(run.folder)
            assert f"stopped by {name}: saved after step {record['step']} of" in output
            assert "Traceback" not in output


def test_second_ctrl_c_kills_ranks_that_do_not_react(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory) as run:
        for pid in run.trainers():
            os.kill(pid, signal.SIGSTOP)
        run.process.send_signal(signal.SIGINT)
        time.sleep(1.5)  # a second Ctrl-C within a second is ignored
        run.process.send_signal(signal.SIGINT)
        assert "killed by a second Ctrl-C" in run.end(code=130, seconds=20)


def test_no_process_survives_a_killed_launcher(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory) as run:
        run.process.kill()
        run.assert_gone(40)
    (record,) = runs.attempts(run.folder)
    assert (record["state"], record["step"]) == ("stopped", runs.saved_step(run.folder))


def test_killed_rank_is_reported_and_restarted(tmp_path_factory: pytest.TempPathFactory) -> None:
    with training(tmp_path_factory, "--max-restarts", "1") as run:
        os.kill(run.trainers()[1], signal.SIGKILL)
        run.wait_for_step(4, after=1)
        os.kill(run.trainers()[0], signal.SIGKILL)
        output = run.end(code=1)
    assert FAILURE.findall(output) == [("1", "killed by SIGKILL"), ("0", "killed by SIGKILL")]
    assert output.count("\nrestarted\n") == 1
    assert "gloo" not in output.partition("\nrestarted\n")[0], "secondary errors are only in the logs"
    assert len(runs.attempts(run.folder)) == 2
    logs = [Path(log) for log in re.findall(r"^log: (.*)$", output, flags=re.M)]
    assert len(logs) == 2
    assert all(log.is_relative_to(run.folder / "logs" / "0001") and log.is_file() for log in logs)
    assert re.search(r"^try: .*memory", output, flags=re.M)


def test_user_error_is_not_restarted(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("local") / "run"
    trainer_options = runs.options(tmp_path_factory, folder, data__root="/nowhere", data__num_workers=0)
    output = runs.finish(regraft("train", "--nproc", "2", "--max-restarts", "3", *trainer_options), folder, code=2)
    errors = [line for line in output.splitlines() if "error" in line]
    assert errors
    assert all(line.startswith("error: data.root is '/nowhere'") for line in errors)
    assert "restarted" not in output
    assert len(runs.attempts(folder)) == 1

    other = folder.with_name("other")
    output = runs.finish(regraft("train", f"--run.dir={other}", "--optim.lrr=1"), other, code=2)
    assert output.startswith("error: command line: there is no option 'optim.lrr'")
    assert not other.exists(), "a wrong command leaves no run folder behind"


def test_signal_after_torchrun_changes_nothing_and_one_before_it_leaves_no_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run_torchrun(*_: object, on_start: Callable[[], None], **__: object) -> TorchrunResult:
        logs.mkdir(parents=True)
        if is_started:
            on_start()
        signal.raise_signal(signal.SIGTERM)
        return TorchrunResult(0, None)

    monkeypatch.setattr(local_run, "run_torchrun", run_torchrun)
    folder, logs = tmp_path / "run", tmp_path / "run" / "logs" / "0001"
    config = TorchrunConfig(processes=2, threads=1, max_restarts=0, trainer=tmp_path, options=(), logs=logs)
    is_started = False
    with pytest.raises(Interrupted), interruptible():
        local_run.run(config, folder)
    assert not folder.exists()
    is_started = True
    with interruptible():
        assert local_run.run(config, folder) == 0
    assert logs.exists()


def test_stop_caused_by_another_ranks_failure_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, logs = tmp_path / "run", tmp_path / "run" / "logs" / "0001"

    def fail(*_: object, **__: object) -> TorchrunResult:
        error = logs / "id" / "attempt_0" / "1" / "error.json"
        error.parent.mkdir(parents=True)
        write_error_file(ValueError("no such layer"), {ERROR_FILE: str(error), "RANK": "1"})
        RunLock.acquire(folder, log=print).end("stopped", "SIGTERM")  # torchrun sends it to the other ranks
        return TorchrunResult(1, None)

    monkeypatch.setattr(local_run, "run_torchrun", fail)
    config = TorchrunConfig(processes=2, threads=1, max_restarts=0, trainer=tmp_path, options=(), logs=logs)
    assert local_run.run(config, folder) == 1
    assert "rank 1" in (printed := capsys.readouterr().err)
    assert "ValueError: no such layer" in printed
