"""Interrupted equals uninterrupted: runs with all features that are killed by SIGKILL and started again."""

import os
import random
import signal
from pathlib import Path

import pytest

from tests import runs


def kill_in_mid_epoch(run: runs.Run, random_: random.Random) -> None:
    """Kill one process in the second epoch, after an update that no checkpoint has."""
    folder = run.folder
    run.wait(lambda: runs.STEPS < runs.saved_step(folder) < runs.last_step(folder), "an update after a checkpoint")
    runs.kill_trainer(run, random_)
    assert runs.saved_step(run.folder) in (runs.STEPS + 2, runs.STEPS + 4)


def kill_at_the_end_of_an_epoch(run: runs.Run, random_: random.Random) -> None:
    """Kill one process right after the checkpoint at the end of the second epoch."""
    run.wait((run.folder / "checkpoints" / f"step-{2 * runs.STEPS:08}-epoch-0002").exists, "epoch 2")
    runs.kill_trainer(run, random_)
    assert runs.saved_step(run.folder) == 2 * runs.STEPS


def kill_launcher(run: runs.Run) -> None:
    """Kill what has started the trainer: the trainer saves its state and exits."""
    run.wait_for_step(2 * runs.STEPS + 1, after=runs.training_attempt(run.folder))
    seen = runs.last_step(run.folder)
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    run.assert_gone(35)
    record = runs.attempts(run.folder)[-1]
    assert (record["state"], record["reason"]) == ("stopped", "SIGTERM")
    assert runs.saved_step(run.folder) >= seen, "the last update was lost"


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_resume_after_sigkill_is_bit_identical(
    processes: int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Two processes are restarted once by torchrun and otherwise, like one, by the same command."""
    folder, random_ = tmp_path / "run", random.Random(6)
    arguments = runs.options(tmp_path_factory, folder, **runs.ALL_FEATURES)
    launcher, reference = ("accelerate", "python") if processes == 1 else (2, 2)
    with runs.start(runs.command(launcher, *arguments, restarts=1), folder) as run:
        kill_in_mid_epoch(run, random_)
        if processes == 1:
            run.end(code=1)
        else:
            kill_at_the_end_of_an_epoch(run, random_)
            run.end(code=1)
            assert "), in epoch 2 after " in run.output
    if processes == 1:
        with runs.start(runs.command("python", *arguments), folder) as run:
            kill_at_the_end_of_an_epoch(run, random_)
            assert "), in epoch 2 after " in run.end(code=-signal.SIGKILL)
    with runs.start(runs.command(launcher, *arguments), folder) as run:
        kill_launcher(run)
        assert f"resuming after epoch 2 of {runs.EPOCHS} (step {2 * runs.STEPS})\n" in run.output
    saved = runs.saved_step(folder)
    assert f"(step {saved})" in runs.finish(runs.command(launcher, *arguments), folder)
    assert [record["state"] for record in runs.attempts(folder)][2:] == ["stopped", "done"]
    runs.assert_each_example_once(folder)
    runs.assert_equal(folder, runs.uninterrupted(tmp_path_factory, reference, **runs.ALL_FEATURES))


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["python", "accelerate", 2, 3])
def test_resume_after_twenty_kills(
    launcher: str | int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random_ = tmp_path / "run", random.Random(3)
    steps = sorted(random_.choices(range(1, runs.STEPS * runs.EPOCHS - 4), k=20))
    print(f"a kill after the steps {steps}")
    # Three processes add gradients in an order that DDP changes after the first update of every start.
    changes = runs.ALL_FEATURES | (runs.WORLD_SIZE_INDEPENDENT if launcher == 3 else {})
    arguments = runs.options(tmp_path_factory, folder, **changes)
    if isinstance(launcher, int):
        with runs.start(runs.command(launcher, *arguments, restarts=len(steps)), folder) as run:
            for step in steps:
                run.wait_for_step(step, after=runs.training_attempt(folder))
                runs.kill_trainer(run, random_)
            run.end(code=0)
    else:
        for step in steps:
            with runs.start(runs.command(launcher, *arguments), folder) as run:
                run.wait_for_step(step, after=runs.training_attempt(folder))
                runs.kill_trainer(run, random_)
                run.end(code=-signal.SIGKILL if launcher == "python" else 1)
        runs.finish(runs.command(launcher, *arguments), folder)
    assert len(runs.attempts(folder)) == len(steps) + 1
    assert runs.attempts(folder)[-1]["state"] == "done"
    runs.assert_each_example_once(folder)
    expected = runs.uninterrupted(tmp_path_factory, "python" if launcher == "accelerate" else launcher, **changes)
    if launcher == 3:
        runs.assert_close(folder, expected)
    else:
        runs.assert_equal(folder, expected)
