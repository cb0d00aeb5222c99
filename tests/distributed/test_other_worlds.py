"""A run that goes on with another number of processes: the same examples, crops and learning rates.

Layer after layer of it is let loose, an epoch each, so that DDP wraps it again on the way, and every stage is resumed.
"""

import random
from pathlib import Path

import pytest

from tests.kills import (
    SAME_ANYWHERE,
    command,
    finish,
    kill_a_trainer,
    options,
    pictures,
    require_close,
    require_each_once,
    saved_step,
    started,
    trained_by,
    updates,
    whole_run,
    worlds,
)

STAGED = {**SAME_ANYWHERE, "transfer__train": "{0: head, 1: last:2, 2: all}", "optim__layer_decay": 0.5}
LOSSES, WEIGHTS = 1e-5, 1e-5
"""Measured: 4e-7 of a loss, 2e-8 in a weight."""


@pytest.mark.slow
def test_one_process_then_two_then_three_of_which_one_is_killed_then_one_again(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    starts = [
        (1, {"data__workers": 1}),
        (2, {"data__workers": 0, "train__accumulation": 2}),
        (3, {"data__workers": 1}),
        (1, {"data__workers": 0}),
    ]
    print(f"seed {(seed := 5)}")
    random_, expected = random.Random(seed), list[int]()
    for number, (processes, changes) in enumerate(starts, 1):
        arguments = options(pictures(tmp_path_factory), folder, **STAGED, **changes)
        before, attempt, is_last = saved_step(folder), trained_by(folder), number == len(starts)
        launched = command("python" if processes == 1 else processes, *arguments, restarts=1)
        with started(launched, folder) as run:
            if processes == 3:
                kill_a_trainer(run, before + 2, random_, after=attempt)
                attempt = trained_by(folder)
            if not is_last:
                run.wait_for_step(before + 2, after=attempt)
                run.process.terminate()
            said = run.end(code=0 if is_last else 1 if processes > 1 else 75)  # torchrun's own code, or ours
        if number > 1:
            assert f"(step {before})" in said
            assert f"on {processes} processes instead of {starts[number - 2][0]}: the same examples" in said
            assert "whose statistics belong to each process" not in said
        expected += [processes] * (saved_step(folder) - before)
        print(f"{processes} processes: from step {before} to {saved_step(folder)}")
    assert set(expected) == {1, 2, 3}
    assert worlds(folder) == expected
    require_each_once(folder)
    require_close(folder, whole_run(tmp_path_factory, "python", **STAGED), losses=LOSSES, weights=WEIGHTS)


@pytest.mark.soak
def test_batch_norm_in_training_is_said_to_differ_and_the_run_goes_on(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    arguments = options(pictures(tmp_path_factory), folder)
    with started(command(2, *arguments), folder) as run:
        run.wait_for_step(4)
        run.process.terminate()
        run.end(code=1)
    said = finish(command("python", *arguments), folder)
    assert "on 1 processes instead of 2" in said
    assert "and BatchNorm, whose statistics belong to each process" in said
    require_each_once(folder)
    assert updates(folder) == updates(whole_run(tmp_path_factory, "python")), (
        "examples, crops and rates are the same"
    )
