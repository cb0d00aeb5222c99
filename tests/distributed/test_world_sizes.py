"""A run that resumes on another number of processes: the same examples, crops and learning rates."""

import random
from pathlib import Path

import pytest

from tests import runs


@pytest.mark.slow
def test_resume_on_two_then_three_then_one_process(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Every start but the last is stopped by SIGTERM; one of the three processes is killed on the way."""
    folder, random_, expected = tmp_path / "run", random.Random(5), list[int]()
    changes = runs.ALL_FEATURES | runs.WORLD_SIZE_INDEPENDENT
    starts = [
        (1, {"data__num_workers": 1}),
        (2, {"data__num_workers": 0, "train__grad_accum_steps": 1}),
        (3, {"data__num_workers": 1}),
        (1, {"data__num_workers": 0}),
    ]
    for number, (processes, more) in enumerate(starts, 1):
        arguments = runs.options(tmp_path_factory, folder, **(changes | more))
        before, attempt, is_last = (runs.saved_step(folder), runs.training_attempt(folder), number == len(starts))
        launched = runs.command("python" if processes == 1 else processes, *arguments, restarts=1)
        with runs.start(launched, folder) as run:
            if processes == 3:
                run.wait_for_step(before + 2, after=attempt)
                runs.kill_trainer(run, random_)
                attempt = runs.training_attempt(folder)
            if not is_last:
                run.wait_for_step(before + 2, after=attempt)
                run.process.terminate()
            output = run.end(code=0 if is_last else 1 if processes > 1 else 75)  # torchrun's own code, or ours
        if number > 1:
            assert f"(step {before})" in output
            assert f"on {processes} processes instead of {starts[number - 2][0]}: the same examples" in output
            assert "BatchNorm, whose statistics" not in output
        expected += [processes] * (runs.saved_step(folder) - before)
    assert set(expected) == {1, 2, 3}
    assert runs.world_sizes(folder) == expected
    runs.assert_each_example_once(folder)
    runs.assert_close(folder, runs.uninterrupted(tmp_path_factory, "python", **changes))


@pytest.mark.soak
def test_a_resume_on_another_world_size_reports_that_batch_norm_differs(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    arguments = runs.options(tmp_path_factory, folder, **runs.ALL_FEATURES)
    with runs.start(runs.command(2, *arguments), folder) as run:
        run.wait_for_step(4)
        run.process.terminate()
        run.end(code=1)
    output = runs.finish(runs.command("python", *arguments), folder)
    assert "on 1 processes instead of 2" in output
    assert "and BatchNorm, whose statistics are each process's own" in output
    runs.assert_each_example_once(folder)
    assert runs.updates(folder) == runs.updates(runs.uninterrupted(tmp_path_factory, "python", **runs.ALL_FEATURES))
