"""Interrupted equals uninterrupted: runs with all features that are killed by SIGKILL and started again."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests.kills import (
    ALL_FEATURES,
    EPOCHS,
    STEPS,
    WORLD_SIZE_INDEPENDENT,
    Run,
    assert_close_runs,
    assert_each_example_once,
    assert_equal_runs,
    attempts,
    command,
    finish,
    kill_trainer,
    last_step,
    make_images,
    options,
    saved_step,
    start_run,
    training_attempt,
    uninterrupted_run,
)


def kill_in_mid_epoch(run: Run, random_: random.Random) -> None:
    """Kill one process in the second epoch, after an update that no checkpoint has."""
    run.wait(lambda: STEPS < saved_step(run.folder) < last_step(run.folder), "an update after a checkpoint")
    kill_trainer(run, random_)
    assert saved_step(run.folder) in (STEPS + 2, STEPS + 4)


def kill_at_the_end_of_an_epoch(run: Run, random_: random.Random) -> None:
    """Kill one process right after the checkpoint at the end of the second epoch."""
    run.wait((run.folder / "checkpoints" / f"step-{2 * STEPS:08}-epoch-0002").exists, "epoch 2")
    kill_trainer(run, random_)
    assert saved_step(run.folder) == 2 * STEPS


def kill_launcher(run: Run) -> None:
    """Kill what has started the trainer: the trainer saves its state and exits."""
    run.wait_for_step(2 * STEPS + 1, after=training_attempt(run.folder))
    seen = last_step(run.folder)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.assert_gone(35)
    record = attempts(run.folder)[-1]
    assert (record["state"], record["reason"]) == ("stopped", "SIGTERM")
    assert saved_step(run.folder) >= seen, "the last update was lost"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_after_sigkill_is_bit_identical(
    processes: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two processes are restarted once by torchrun and otherwise, like one, by the same command."""
    folder, random_ = tmp_path / "run", random.Random(6)
    arguments = options(make_images(tmp_path_factory), folder, **ALL_FEATURES)
    launcher: str | int = "accelerate" if processes == 1 else 2
    with start_run(command(launcher, *arguments, restarts=1), folder) as run:
        kill_in_mid_epoch(run, random_)
        if processes == 1:
            run.end(code=1)
        else:
            kill_at_the_end_of_an_epoch(run, random_)
            run.end(code=1)
            assert "), in epoch 2 after " in run.output
    if processes == 1:
        with start_run(command("python", *arguments), folder) as run:
            kill_at_the_end_of_an_epoch(run, random_)
            assert "), in epoch 2 after " in run.end(code=-signal.SIGKILL)
    with start_run(command(launcher, *arguments), folder) as run:
        kill_launcher(run)
        assert f"resuming after epoch 2 of {EPOCHS} (step {2 * STEPS})\n" in run.output
    saved = saved_step(folder)
    assert f"(step {saved})" in finish(command(launcher, *arguments), folder)
    assert [record["state"] for record in attempts(folder)][2:] == ["stopped", "done"]
    assert_each_example_once(folder)
    assert_equal_runs(
        folder, uninterrupted_run(tmp_path_factory, launcher if processes > 1 else "python", **ALL_FEATURES)
    )


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["python", "accelerate", 2, 3])
def test_resume_after_twenty_kills(
    launcher: str | int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random_ = tmp_path / "run", random.Random(3)
    steps = sorted(random_.choices(range(1, STEPS * EPOCHS - 4), k=20))
    print(f"a kill after the steps {steps}")
    # Three processes add gradients in an order that DDP changes after the first update of every start.
    changes = ALL_FEATURES | (WORLD_SIZE_INDEPENDENT if launcher == 3 else {})
    arguments = options(make_images(tmp_path_factory), folder, **changes)
    if isinstance(launcher, int):
        with start_run(command(launcher, *arguments, restarts=len(steps)), folder) as run:
            for step in steps:
                run.wait_for_step(step, after=training_attempt(folder))
                kill_trainer(run, random_)
            run.end(code=0)
    else:
        for step in steps:
            with start_run(command(launcher, *arguments), folder) as run:
                run.wait_for_step(step, after=training_attempt(folder))
                kill_trainer(run, random_)
                run.end(code=-signal.SIGKILL if launcher == "python" else 1)
        finish(command(launcher, *arguments), folder)
    assert len(attempts(folder)) == len(steps) + 1
    assert attempts(folder)[-1]["state"] == "done"
    assert_each_example_once(folder)
    expected = uninterrupted_run(
        tmp_path_factory, "python" if launcher == "accelerate" else launcher, **changes
    )
    if launcher == 3:
        assert_close_runs(folder, expected)
    else:
        assert_equal_runs(folder, expected)
