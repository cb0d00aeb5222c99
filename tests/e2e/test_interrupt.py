"""Signals and the file STOP, at any time: the run saves, says so and leaves; the same command goes on from there."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.kills import (
    EPOCHS,
    STEPS,
    Run,
    assert_equal_runs,
    attempts,
    catches,
    children,
    command,
    epochs_of,
    finish,
    last_step,
    newest,
    options,
    pictures,
    require_each_once,
    saved_step,
    started,
    state_of,
    whole_run,
)
from trainer.checkpoint import store

SECONDS_BETWEEN_LOOKS = 1.0
"""How often a run looks for the file STOP."""
MOMENTS = ("in training", "while a checkpoint is written")
EVALUATION = "in an evaluation"


def send(run: Run, name: str) -> None:
    """Ask a run to stop, by a signal to what was started, or by the file STOP."""
    if name == "STOP":
        (run.folder / "STOP").touch()
    else:
        os.kill(run.process.pid, signal.Signals[name])


def hold(run: Run, pid: int, condition: Callable[[], bool], what: str) -> None:
    """Bring a process to a halt at a moment that does not last."""
    while True:
        run.wait(condition, what)
        os.kill(pid, signal.SIGSTOP)
        run.wait(lambda: state_of(pid) == "T", "to be held")
        if condition():
            return
        os.kill(pid, signal.SIGCONT)


def stop_at(run: Run, name: str, moment: str, step: int) -> int:
    """Ask a run of one process to stop after `step`, at such a moment; returns the last step it had told of."""

    def is_there() -> bool:
        if moment == "while a checkpoint is written" and not any(run.folder.glob("checkpoints/.writing-*")):
            return False
        return last_step(run.folder) > step

    hold(run, run.process.pid, is_there, moment)
    seen = last_step(run.folder)
    print(f"{moment}, step {seen}: {name}", flush=True)
    send(run, name)
    if name == "STOP":
        time.sleep(SECONDS_BETWEEN_LOOKS + 0.1)  # a run as short as this might not look again
    os.kill(run.process.pid, signal.SIGCONT)
    return seen


def stop_in_evaluation(run: Run, name: str) -> int:
    """Ask a run of one process to stop while it evaluates; returns the last step it had told of.

    The process that loads the evaluation's images is there since the first one: held, it keeps the next from its end.
    """
    done = len(epochs_of(run.folder))
    run.wait(lambda: len(epochs_of(run.folder)) > done, "the first evaluation")
    loaders = sorted(children(run.process.pid))
    assert len(loaders) == 2, "one loads images to train on, one those to evaluate"
    os.kill(loaders[1], signal.SIGSTOP)
    step = STEPS * (len(epochs_of(run.folder)) + 1)
    run.wait(lambda: last_step(run.folder) == step, "the end of the next epoch")
    print(f"in the evaluation after step {step}: {name}", flush=True)
    send(run, name)
    os.kill(loaders[1], signal.SIGCONT)
    return step


@pytest.mark.slow
def test_a_run_that_is_stopped_again_and_again_ends_as_if_nothing_had_happened(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    stop_and_go_on(["SIGINT", "STOP"], tmp_path / "run", tmp_path_factory, seed=11)


@pytest.mark.soak
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", range(20, 25))
def test_a_run_that_is_stopped_in_every_way_ends_as_if_nothing_had_happened(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    names = ["SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "STOP"]
    stop_and_go_on(names, tmp_path / "run", tmp_path_factory, seed=seed, train__epochs=6)


def stop_and_go_on(
    names: list[str], folder: Path, factory: pytest.TempPathFactory, *, seed: int, **changes: object
) -> None:
    """Stop a run in each of these ways, one of them in an evaluation, and let it come to its end."""
    random_, epochs = random.Random(seed), int(str(changes.get("train__epochs", EPOCHS)))
    arguments = command("python", *options(pictures(factory), folder, checkpoint__every="1 steps", **changes))
    stops = [(name, MOMENTS[number % 2]) for number, name in enumerate(random_.sample(names, len(names)))]
    # Early, since it takes an epoch and more; and STOP is only looked for now and then.
    number = random_.choice([n for n in (0, 1) if stops[n][0] != "STOP"])
    stops[number] = (stops[number][0], EVALUATION)
    print(f"seed {seed}: {stops}")
    for number, (name, moment) in enumerate(stops, 1):
        before = saved_step(folder)
        with started(arguments, folder) as run:
            run.wait_for_step(before, after=number - 1)
            seen = (
                stop_in_evaluation(run, name) if moment == EVALUATION else stop_at(run, name, moment, before)
            )
            said = run.end(code=75)
        reason = "the file STOP" if name == "STOP" else name
        assert f"stopped by {reason}: saved at" in said
        assert "Traceback" not in said
        record = attempts(folder)[-1]
        assert (record["attempt"], record["state"], record["reason"]) == (number, "stopped", reason)
        assert record["step"] == saved_step(folder) >= seen, "not even one step is lost"
        if moment == EVALUATION:
            assert f"saved at step {seen} of {STEPS * epochs}, in epoch {seen // STEPS} of" in said
        assert not [path for path in folder.rglob(".*") if path.is_dir() or path.suffix == ".tmp"]
        assert not (folder / "STOP").exists(), "it was honoured, and does not stop the next start"
    finish(arguments, folder)
    require_each_once(folder, epochs=epochs)
    assert_equal_runs(folder, whole_run(factory, "python", **changes))


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(12, marks=pytest.mark.slow),
        *(pytest.param(n, marks=pytest.mark.soak) for n in range(30, 60)),
    ],
)
def test_a_start_that_is_asked_to_stop_does_so_at_any_time(
    seed: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random_ = tmp_path / "run", random.Random(seed)
    arguments = command("python", *options(pictures(tmp_path_factory), folder))
    name, delay = random_.choice(["SIGTERM", "SIGINT", "SIGHUP", "SIGUSR1"]), random_.uniform(0, 4)
    print(f"seed {seed}: {name} {delay:.2f} s after the handlers are there")
    with started(arguments, folder) as run:
        run.wait(lambda: catches(run.process.pid, signal.SIGTERM), "its handlers")
        time.sleep(delay)
        send(run, name)
        said = run.end(code=75, seconds=20)
    assert f"stopped by {name}: " in said
    assert "Traceback" not in said
    assert all((one["state"], one["reason"]) == ("stopped", name) for one in attempts(folder))


@pytest.mark.slow
def test_several_processes_stop_together_and_are_not_started_again(
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
    stops: list[str], folder: Path, factory: pytest.TempPathFactory, *, seed: int, **changes: object
) -> None:
    """Stop a run of two processes in each of these ways, and let it come to its end."""
    random_, epochs = random.Random(seed), int(str(changes.get("train__epochs", EPOCHS)))
    print(f"seed {seed}: {stops}")
    every = options(pictures(factory), folder, checkpoint__every="1 steps", **changes)
    for number, stop in enumerate(stops, 1):
        # A torchrun is given each time: its rendezvous has a port of its own.
        with started(command(2, *every, restarts=3), folder) as run:
            run.wait_for_step(saved_step(folder) + random_.randrange(1, 3), after=number - 1)
            seen, name = last_step(folder), stop.partition(" ")[0]
            print(f"step {seen}: {stop}", flush=True)
            if stop.endswith("one process"):
                os.kill(random_.choice(sorted(run.trainers())), signal.Signals[name])
            elif name == "STOP":
                for pid in run.trainers():
                    os.kill(pid, signal.SIGSTOP)
                send(run, name)
                time.sleep(SECONDS_BETWEEN_LOOKS + 0.1)  # a run as short as this might not look again
                for pid in run.trainers():
                    os.kill(pid, signal.SIGCONT)
            else:
                send(run, name)
            # After a signal of its own torchrun says 1, however its processes have ended.
            said = run.end(code=1 if stop.endswith("torchrun") else 0)
        assert said.count("stopped by") == 1
        records = attempts(folder)
        assert len(records) == number, "torchrun has started nothing again"
        reason = "the file STOP" if name == "STOP" else name
        assert (records[-1]["state"], records[-1]["reason"]) == ("stopped", reason)
        assert saved_step(folder) >= seen
    finish(command(2, *every), folder)
    require_each_once(folder, epochs=epochs)
    assert_equal_runs(folder, whole_run(factory, 2, **changes))


@pytest.mark.slow
def test_a_second_ctrl_c_does_not_wait_for_the_update(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    slow = {"data__image_size": 256, "model__name": "resnet18", "train__batch_size": 22, "data__workers": 0}
    arguments = options(pictures(tmp_path_factory), folder, checkpoint__every="1 steps", **slow)
    with started(command("python", *arguments), folder) as run:
        run.wait(lambda: saved_step(folder) == 1, "a checkpoint")
        run.wait_for_step(1)
        os.kill(run.process.pid, signal.SIGINT)
        time.sleep(1.1)  # sooner, it would pass for a launcher's echo
        seen = last_step(folder)
        os.kill(run.process.pid, signal.SIGINT)
        said = run.end(code=130, seconds=60)
    assert seen == 1, "the update that followed the first Ctrl-C has not come to its end"
    assert "interrupted before the state could be saved" in said
    assert "Traceback" not in said
    assert attempts(folder)[-1]["state"] == "failed"
    assert store.read(newest(folder)).state.step == 1


@pytest.mark.slow
@pytest.mark.parametrize("resume", ["auto", pytest.param("never", marks=pytest.mark.soak)])
def test_a_second_start_in_the_same_folder_is_refused_and_the_first_goes_on(
    resume: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    arguments = command("python", *options(pictures(tmp_path_factory), folder))
    with started(arguments, folder) as first:
        hold(first, first.process.pid, lambda: last_step(folder) >= 3, "step 3")
        before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
        said = finish([*arguments, f"--run.resume={resume}"], folder, code=2)
        assert f"attempt 1 of this run is going on (process {first.process.pid} on " in said
        assert "choose another run.dir, wait for it, or ask it to stop by a file named STOP" in said
        assert "Traceback" not in said
        assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
        os.kill(first.process.pid, signal.SIGCONT)
        first.end(code=0)
    assert_equal_runs(folder, whole_run(tmp_path_factory, "python"))
