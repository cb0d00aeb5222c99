"""Signals and the file STOP: the run saves and exits, and the same command resumes it, with an equal result."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests import runs
from tests.slurm.jobs import with_sitecustomize
from trainer.checkpoint import store

SECONDS_BETWEEN_CHECKS = 1.0
"""How often a run looks for the file STOP."""
TRAINING, WRITING, EVALUATING, ONE_RANK = ("training", "writing a checkpoint", "evaluating", "training, to one rank")
Stops = list[tuple[str, str]]
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


def suspend(run: runs.Run, condition: Callable[[], bool], what: str) -> list[int]:
    """Suspend the trainer's processes while a condition holds that does not last; return them."""
    while True:
        run.wait(condition, what)
        trainers = run.trainers()
        for pid in trainers:
            os.kill(pid, signal.SIGSTOP)
        run.wait(lambda pids=trainers: all(runs.process_state(pid) == "T" for pid in pids), "to be suspended")
        if condition():
            return trainers
        for pid in trainers:
            os.kill(pid, signal.SIGCONT)


def stop(run: runs.Run, name: str, moment: str, step: int) -> int:
    """Stop a run after `step` by a signal or by the file STOP; return the last step that it has logged."""

    def has_come() -> bool:
        is_writing = any(run.folder.glob("checkpoints/.writing-*"))
        return runs.last_step(run.folder) > step and (moment != WRITING or is_writing)

    trainers = suspend(run, has_come, moment)
    seen = runs.last_step(run.folder)
    if moment == WRITING:
        assert_second_start_is_refused(run)
    if name == "STOP":
        (run.folder / "STOP").touch()
        time.sleep(SECONDS_BETWEEN_CHECKS + 0.1)  # a run as short as this might not look again
    else:
        os.kill(trainers[-1] if moment == ONE_RANK else run.process.pid, signal.Signals[name])
    for pid in trainers:
        os.kill(pid, signal.SIGCONT)
    return seen


def assert_second_start_is_refused(first: runs.Run) -> None:
    """Check that a second start in the folder of a suspended run changes nothing."""
    before = {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")}
    output = runs.finish(list(first.process.args), first.folder, code=2)
    number = len(runs.attempts(first.folder))
    assert f"attempt {number} of this run is still running (process {first.process.pid} on " in output
    assert "Traceback" not in output
    assert {path: path.stat().st_mtime_ns for path in first.folder.rglob("*")} == before


def stop_while_evaluating(run: runs.Run, name: str) -> int:
    """Stop the first start of a run of one process in an evaluation; return the last step that it has logged.

    The loader workers of evaluation stay alive after the first one; a suspended one keeps the next from its end.
    """
    run.wait(lambda: runs.completed_epochs(run.folder), "the first evaluation")
    workers = sorted(runs.children(run.process.pid))
    assert len(workers) == 3, "one for each of train, val and test"
    os.kill(workers[1], signal.SIGSTOP)
    step = runs.STEPS * (len(runs.completed_epochs(run.folder)) + 1)
    run.wait(lambda: runs.last_step(run.folder) == step, "the end of the next epoch")
    os.kill(run.process.pid, signal.Signals[name])
    os.kill(workers[1], signal.SIGCONT)
    return step


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stops"),
    [("python", [("SIGINT", EVALUATING), ("STOP", WRITING)]), (2, [("STOP", TRAINING), ("SIGUSR1", ONE_RANK)])],
)
def test_resume_after_stops_is_bit_identical(
    launcher: str | int, stops: Stops, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stop_and_resume(launcher, stops, tmp_path / "run", tmp_path_factory)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20, 25))
@pytest.mark.parametrize("launcher", ["python", 2])
def test_resume_after_every_kind_of_stop_is_bit_identical(
    launcher: str | int, seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random_ = random.Random(seed)
    first, *others = random_.sample(SIGNALS, len(SIGNALS))
    other = WRITING if launcher == "python" else ONE_RANK
    stops = [(name, random_.choice([TRAINING, other])) for name in others]
    stops = [(first, EVALUATING if launcher == "python" else TRAINING), *stops, ("STOP", TRAINING)]
    stop_and_resume(launcher, stops, tmp_path / "run", tmp_path_factory, train__epochs=6)


def stop_and_resume(
    launcher: str | int, stops: Stops, folder: Path, factory: pytest.TempPathFactory, **more: object
) -> None:
    """Stop a run by each signal at its moment, and let it finish."""
    changes = runs.ALL_FEATURES | more
    epochs = int(str(more.get("train__epochs", runs.EPOCHS)))
    arguments = runs.options(factory, folder, **(changes | {"checkpoint__every": "1 steps"}))
    print(stops)
    for number, (name, moment) in enumerate(stops, 1):
        before = runs.saved_step(folder)
        with runs.start(runs.command(launcher, *arguments, restarts=3), folder) as run:
            run.wait_for_step(before, after=number - 1)
            seen = stop_while_evaluating(run, name) if moment == EVALUATING else stop(run, name, moment, before)
            # After a signal of its own torchrun exits with 1, however its processes have ended.
            signaled = name != "STOP" and moment != ONE_RANK
            output = run.end(code=75 if launcher == "python" else 1 if signaled else 0)
        reason = "the file STOP" if name == "STOP" else name
        assert output.count(f"stopped by {reason}: saved at") == 1
        assert launcher != "python" or "Traceback" not in output
        assert len(runs.attempts(folder)) == number, "torchrun has restarted the run"
        record = runs.attempts(folder)[-1]
        assert (record["attempt"], record["state"], record["reason"]) == (number, "stopped", reason)
        assert record["step"] == runs.saved_step(folder) >= seen, "a step is lost"
        if moment == EVALUATING:
            position = f"step {seen} of {runs.STEPS * epochs}, in epoch {seen // runs.STEPS} of"
            assert f"saved at {position}" in output
        assert not [path for path in folder.rglob(".*") if path.is_dir() or path.suffix == ".tmp"]
        assert not (folder / "STOP").exists(), "it would stop the next start"
    runs.finish(runs.command(launcher, *arguments), folder)
    runs.assert_each_example_once(folder, epochs=epochs)
    runs.assert_equal(folder, runs.uninterrupted(factory, launcher, **changes))


@pytest.mark.parametrize(
    "seed",
    [pytest.param(12, marks=pytest.mark.slow), *(pytest.param(n, marks=pytest.mark.soak) for n in range(30, 60))],
)
def test_a_starting_run_stops_at_any_time(seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, random_ = tmp_path / "run", random.Random(seed)
    arguments = runs.command("python", *runs.options(tmp_path_factory, folder, **runs.ALL_FEATURES))
    name, delay = random_.choice(["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]), random_.uniform(0, 4)
    print(f"{name} {delay:.2f} s after the handlers are installed")
    with runs.start(arguments, folder) as run:
        run.wait(lambda: runs.handles_signal(run.process.pid, signal.SIGTERM), "its handlers")
        time.sleep(delay)
        os.kill(run.process.pid, signal.Signals[name])
        output = run.end(code=75, seconds=20)
    assert f"stopped by {name}: " in output
    assert "Traceback" not in output
    assert all((one["state"], one["reason"]) == ("stopped", name) for one in runs.attempts(folder))


BLOCK_THE_SECOND_UPDATE = """\
import time
from torch.optim.optimizer import register_optimizer_step_pre_hook
pauses = iter([0, 600])
register_optimizer_step_pre_hook(lambda *_: print("update", flush=True) or time.sleep(next(pauses)))
"""


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_update(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path / "run"
    environment = runs.ON_CPU | with_sitecustomize(tmp_path / "site", BLOCK_THE_SECOND_UPDATE)
    arguments = runs.options(tmp_path_factory, folder, checkpoint__every="1 steps")
    with runs.start(runs.command("python", *arguments), folder, environment=environment) as run:
        run.wait(lambda: runs.saved_step(folder) == 1 and run.output.count("update\n") == 2, "the second update")
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(1.5)  # within a second, it would count as a launcher's echo
        os.kill(run.process.pid, signal.SIGINT)
        output = run.end(code=130)
    assert "interrupted by a second Ctrl-C: what was saved earlier is intact" in output
    assert "Traceback" not in output
    assert runs.attempts(folder)[-1]["state"] == "failed"
    assert store.read(runs.latest_checkpoint(folder)).state.step == 1
