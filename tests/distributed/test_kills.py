"""SIGKILL at any time: the run ends as if nothing had happened, and leaves no process behind."""

import os
import random
import signal
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.kills import (
    EPOCHS,
    SAME_ANYWHERE,
    STEPS,
    Run,
    assert_equal_runs,
    attempts,
    command,
    finish,
    kill_a_trainer,
    last_step,
    options,
    pictures,
    require_close,
    require_each_once,
    saved_step,
    started,
    trained_by,
    whole_run,
)

# Three processes add gradients in an order that DDP changes after the first update of every start. Measured: one update
# is apart by 7e-9 in any weight; what becomes of it belongs to the model: 2e-6 over 18 updates of a MobileNet, but 2e-1
# of a GoogLeNet, whose BatchNorm here sees one or two pictures at a time.
LOSSES, WEIGHTS = 1e-5, 1e-5


def schedule(seed: int, kills: int) -> list[int]:
    """Return the steps after which somebody is killed."""
    steps = sorted(random.Random(seed).choices(range(1, STEPS * EPOCHS - 4), k=kills))
    print(f"seed {seed}: a kill after the steps {steps}")
    return steps


def survive(launcher: str | int, steps: Sequence[int], folder: Path, arguments: list[str], seed: int) -> None:
    """Kill the trainer, or one of its processes, after each of these steps; torchrun starts it again, or we do."""
    random_ = random.Random(seed)
    if isinstance(launcher, int):
        with started(command(launcher, *arguments, restarts=len(steps)), folder) as run:
            for step in steps:
                kill_a_trainer(run, step, random_, after=trained_by(folder))
            run.end(code=0)
        return
    for step in steps:
        with started(command(launcher, *arguments), folder) as run:
            kill_a_trainer(run, step, random_, after=trained_by(folder))
            run.end(code=-signal.SIGKILL if launcher == "python" else 1)
    finish(command(launcher, *arguments), folder)


def require_survived(folder: Path, starts: int) -> None:
    records = attempts(folder)
    assert len(records) == starts
    assert records[-1]["state"] == "done"
    require_each_once(folder)


@pytest.mark.slow
def test_a_trainer_that_is_killed_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, steps = tmp_path / "run", schedule(seed=6, kills=1)
    survive("python", steps, folder, options(pictures(tmp_path_factory), folder), seed=6)
    require_survived(folder, len(steps) + 1)
    assert_equal_runs(folder, whole_run(tmp_path_factory, "python"))


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["accelerate", 2])
def test_one_process_is_killed_and_then_the_launcher(
    launcher: str | int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, random_ = tmp_path / "run", random.Random(8)
    arguments = command(launcher, *options(pictures(tmp_path_factory), folder), restarts=1)
    first, second = schedule(seed=8, kills=2)
    with started(arguments, folder) as run:
        kill_a_trainer(run, first, random_, after=0)
        if launcher == 2:
            kill_launcher(run, second)
        else:
            run.end(code=1)
    if launcher != 2:
        with started(arguments, folder) as run:
            kill_launcher(run, second)
    saved = saved_step(folder)
    assert f"(step {saved})" in finish(arguments, folder)
    require_survived(folder, 3)
    assert_equal_runs(folder, whole_run(tmp_path_factory, launcher if launcher == 2 else "python"))


def kill_launcher(run: Run, step: int) -> None:
    """Kill what has started the trainer, which then has to save and leave."""
    run.wait_for_step(step, after=1)
    seen = last_step(run.folder)
    print(f"step {seen} of attempt 2: SIGKILL to the launcher {run.process.pid}")
    os.kill(run.process.pid, signal.SIGKILL)
    run.process.wait()
    print(f"all gone after {run.require_gone(35):.2f} s")
    record = attempts(run.folder)[-1]
    assert (record["state"], record["reason"]) == ("stopped", "SIGTERM")
    assert saved_step(run.folder) >= seen, "what they had done is saved"


@pytest.mark.soak
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("launcher", ["python", "accelerate", 2, 3])
def test_twenty_kills(launcher: str | int, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder, steps = tmp_path / "run", schedule(seed=3, kills=20)
    changes = SAME_ANYWHERE if launcher == 3 else {"model__name": "googlenet"}
    survive(launcher, steps, folder, options(pictures(tmp_path_factory), folder, **changes), seed=3)
    require_survived(folder, len(steps) + 1)
    whole = whole_run(tmp_path_factory, "python" if launcher == "accelerate" else launcher, **changes)
    if launcher == 3:
        require_close(folder, whole, losses=LOSSES, weights=WEIGHTS)
    else:
        assert_equal_runs(folder, whole)
