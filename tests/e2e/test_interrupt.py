"""Signals and the file STOP: the run saves and exits, and the same command resumes it, with an equal result."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kills import (
    ALL_FEATURES,
    EPOCHS,
    STEPS,
    Run,
    assert_each_example_once,
    assert_equal_runs,
    attempts,
    children,
    command,
    completed_epochs,
    finish,
    handles_signal,
    last_step,
    latest_checkpoint,
    make_images,
    options,
    process_state,
    saved_step,
    start_run,
    uninterrupted_run,
)
from trainer.checkpoint import store

SECONDS_BETWEEN_CHECKS = 1.0
"""How often a run looks for the file STOP."""
TRAINING, WRITING, EVALUATING = "training", "writing a checkpoint", "evaluating"
SIGNALS = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP"]


def reason_of(name: str) -> str:
    return "the file STOP" if name == "STOP" else name


def send(run: Run, name: str) -> None:
    """Send a signal to the process that was started, or create the file STOP."""
    if name == "STOP":
        (run.folder / "STOP").touch()
        time.sleep(SECONDS_BETWEEN_CHECKS + 0.1)  # a run as short as this might not look again
    else:
        os.kill(run.process.pid, signal.Signals[name])


def suspend(run: Run, pid: int, condition: Callable[[], bool], what: str) -> None:
    """Suspend a process while a condition holds that does not last."""
    while True:
        run.wait(condition, what)
        os.kill(pid, signal.SIGSTOP)
        run.wait(lambda: process_state(pid) == "T", "to be suspended")
        if condition():
            return
        os.kill(pid, signal.SIGCONT)


def stop_at(run: Run, name: str, moment: str, step: int) -> int:
    """Stop a run of one process after `step`, at a moment; return the last step that it has logged."""

    def has_come() -> bool:
        is_writing = any(run.folder.glob("checkpoints/.writing-*"))
        return last_step(run.folder) > step and (moment == TRAINING or is_writing)

    suspend(run, run.process.pid, has_come, moment)
    seen = last_step(run.folder)
    send(run, name)
    os.kill(run.process.pid, signal.SIGCONT)
    return seen


def stop_while_evaluating(run: Run, name: str) -> int:
    """Stop a run of one process in an evaluation; return the last step that it has logged.

    The loader workers of evaluation stay alive after the first one; a suspended one keeps the next from its end.
    """
    done = len(completed_epochs(run.folder))
    run.wait(lambda: len(completed_epochs(run.folder)) > done, "the first evaluation")
    workers = sorted(children(run.process.pid))
    assert len(workers) == 3, "one for each of train, val and test"
    os.kill(workers[1], signal.SIGSTOP)
    step = STEPS * (len(completed_epochs(run.folder)) + 1)
    run.wait(lambda: last_step(run.folder) == step, "the end of the next epoch")
    os.kill(run.process.pid, signal.Signals[name])
    os.kill(workers[1], signal.SIGCONT)
    return step


@pytest.mark.slow
def test_resume_after_stops_is_bit_identical(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stop_and_resume([("SIGINT", EVALUATING), ("STOP", WRITING)], tmp_path / "run", tmp_path_factory)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20, 25))
def test_resume_after_every_kind_of_stop_is_bit_identical(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    random_ = random.Random(seed)
    first, *others = random_.sample(SIGNALS, len(SIGNALS))
    stops = [(name, random_.choice([TRAINING, WRITING])) for name in (*others, "STOP")]
    stop_and_resume([(first, EVALUATING), *stops], tmp_path / "run", tmp_path_factory, train__epochs=6)


def stop_and_resume(
    stops: list[tuple[str, str]], folder: Path, factory: pytest.TempPathFactory, **more: object
) -> None:
    """Stop a run of one process by each signal at its moment, and let it finish."""
    changes = ALL_FEATURES | more
    epochs = int(str(more.get("train__epochs", EPOCHS)))
    arguments = command(
        "python", *options(make_images(factory), folder, **(changes | {"checkpoint__every": "1 steps"}))
    )
    print(stops)
    for number, (name, moment) in enumerate(stops, 1):
        before = saved_step(folder)
        with start_run(arguments, folder) as run:
            run.wait_for_step(before, after=number - 1)
            if moment == EVALUATING:
                seen = stop_while_evaluating(run, name)
            else:
                seen = stop_at(run, name, moment, before)
            output = run.end(code=75)
        assert f"stopped by {reason_of(name)}: saved at" in output
        assert "Traceback" not in output
        record = attempts(folder)[-1]
        assert (record["attempt"], record["state"], record["reason"]) == (number, "stopped", reason_of(name))
        assert record["step"] == saved_step(folder) >= seen, "a step is lost"
        if moment == EVALUATING:
            assert f"saved at step {seen} of {STEPS * epochs}, in epoch {seen // STEPS} of" in output
        assert not [path for path in folder.rglob(".*") if path.is_dir() or path.suffix == ".tmp"]
        assert not (folder / "STOP").exists(), "it would stop the next start"
    finish(arguments, folder)
    assert_each_example_once(folder, epochs=epochs)
    assert_equal_runs(folder, uninterrupted_run(factory, "python", **changes))


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(12, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.soak) for n in range(30, 60)),
    ],
)
def test_a_starting_run_stops_at_any_time(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random_ = tmp_path / "run", random.Random(seed)
    arguments = command("python", *options(make_images(tmp_path_factory), folder, **ALL_FEATURES))
    name, delay = random_.choice(["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]), random_.uniform(0, 4)
    print(f"{name} {delay:.2f} s after the handlers are installed")
    with start_run(arguments, folder) as run:
        run.wait(lambda: handles_signal(run.process.pid, signal.SIGTERM), "its handlers")
        time.sleep(delay)
        send(run, name)
        output = run.end(code=75, seconds=20)
    assert f"stopped by {name}: " in output
    assert "Traceback" not in output
    assert all((one["state"], one["reason"]) == ("stopped", name) for one in attempts(folder))


@pytest.mark.slow
def test_several_processes_stop_together_and_are_not_restarted(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stop_several(["STOP", "SIGUSR1 to one process"], tmp_path / "run", tmp_path_factory, seed=13)


@pytest.mark.soak
@pytest.mark.parametrize("seed", [14, 15, 16])
def test_several_processes_stop_together_at_any_time(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stops = ["SIGTERM to torchrun", "SIGINT to torchrun", "SIGHUP to torchrun", "STOP"]
    stops += [f"{name} to one process" for name in ("SIGTERM", "SIGUSR1", "SIGUSR2")]
    random.Random(seed).shuffle(stops)
    stop_several(stops, tmp_path / "run", tmp_path_factory, seed=seed, train__epochs=6)


def stop_several(
    stops: list[str], folder: Path, factory: pytest.TempPathFactory, *, seed: int, **more: object
) -> None:
    """Stop a run of two processes in each of these ways, and let it finish."""
    random_, changes = random.Random(seed), ALL_FEATURES | more
    arguments = options(make_images(factory), folder, **(changes | {"checkpoint__every": "1 steps"}))
    print(stops)
    for number, stop in enumerate(stops, 1):
        with start_run(
            command(2, *arguments, restarts=3), folder
        ) as run:  # a torchrun with a port of its own
            run.wait_for_step(saved_step(folder) + random_.randrange(1, 3), after=number - 1)
            seen, name = last_step(folder), stop.partition(" ")[0]
            if stop.endswith("one process"):
                os.kill(random_.choice(sorted(run.trainers())), signal.Signals[name])
            elif name == "STOP":
                trainers = run.trainers()
                for pid in trainers:
                    os.kill(pid, signal.SIGSTOP)
                send(run, name)
                for pid in trainers:
                    os.kill(pid, signal.SIGCONT)
            else:
                send(run, name)
            # After a signal of its own torchrun exits with 1, however its processes have ended.
            output = run.end(code=1 if stop.endswith("torchrun") else 0)
        assert output.count("stopped by") == 1
        records = attempts(folder)
        assert len(records) == number, "torchrun has restarted the run"
        assert (records[-1]["state"], records[-1]["reason"]) == ("stopped", reason_of(name))
        assert saved_step(folder) >= seen
    finish(command(2, *arguments), folder)
    assert_each_example_once(folder, epochs=int(str(more.get("train__epochs", EPOCHS))))
    assert_equal_runs(folder, uninterrupted_run(factory, 2, **changes))


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_update(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    slow = {
        "data__image_size": 256,
        "model__name": "resnet18",
        "model__weights": "null",
        "train__batch_size": 22,
    }
    arguments = options(
        make_images(tmp_path_factory), folder, checkpoint__every="1 steps", data__num_workers=0, **slow
    )
    with start_run(command("python", *arguments), folder) as run:
        run.wait(lambda: saved_step(folder) == 1, "a checkpoint")
        run.wait_for_step(1)
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(1.1)  # sooner, it would count as a launcher's echo
        seen = last_step(folder)
        os.kill(run.process.pid, signal.SIGINT)
        output = run.end(code=130, seconds=60)
    assert seen == 1, "the update after the first Ctrl-C has completed: it is too fast for this test"
    assert "interrupted before the state could be saved" in output
    assert "Traceback" not in output
    assert attempts(folder)[-1]["state"] == "failed"
    assert store.read(latest_checkpoint(folder)).state.step == 1


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", pytest.param("never", marks=pytest.mark.soak)])
def test_a_second_start_in_the_same_folder_is_refused_and_the_first_goes_on(
    resume: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    arguments = command("python", *options(make_images(tmp_path_factory), folder, **ALL_FEATURES))
    with start_run(arguments, folder) as first:
        suspend(first, first.process.pid, lambda: last_step(folder) >= 3, "step 3")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        output = finish([*arguments, f"--run.resume={resume}"], folder, code=2)
        assert "attempt 1 of this run is still running" in output
        assert f"(process {first.process.pid} on " in output
        assert "Traceback" not in output
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        os.kill(first.process.pid, signal.SIGCONT)
        first.end(code=0)
    assert_equal_runs(folder, uninterrupted_run(tmp_path_factory, "python", **ALL_FEATURES))
