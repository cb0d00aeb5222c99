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
        (2, {"data__num_workers": 0, "train__grad_accum_steps": 1, "train__micro_batch_size": "auto"}),
        (3, {"data__num_workers": 1, "train__gradient_checkpointing": "true"}),
        (1, {"data__num_workers": 0}),
    ]
    for number, (processes, more) in enumerate(starts, 1):
        arguments = runs.options(tmp_path_factory, folder, **(changes | more))
        before, attempt, is_last = (runs.saved_step(folder), runs.training_attempt(folder), number == len(starts))
        launched = runs.command("python" if processes == 1 else processes, *arguments, restarts=1)
        # The last batch of an epoch has 2 examples: one of three processes gets none.
        step = (before // runs.STEPS + 1) * runs.STEPS if processes == 3 else before + 2
        with runs.start(launched, folder) as run:
            if processes == 3:
                run.wait_for_step(step, after=attempt)
                runs.kill_trainer(run, random_)
                attempt = runs.training_attempt(folder)
            if not is_last:
                run.wait_for_step(step, after=attempt)
                run.process.terminate()
            output = run.end(code=0 if is_last else 1 if processes > 1 else 75)  # torchrun's own code, or ours
        if number > 1:
            assert f"(step {before})" in output
            assert f"on {processes} processes instead of {starts[number - 2][0]}: the same examples" in output
            assert "BatchNorm, whose statistics" not in output
        expected += [processes] * (runs.saved_step(folder) - before)
    assert set(expected) == {1, 2, 3}
    assert 3 in expected[runs.STEPS - 1 :: runs.STEPS]
    assert runs.world_sizes(folder) == expected
    runs.assert_each_example_once(folder)
    runs.assert_close(folder, runs.uninterrupted(tmp_path_factory, "python", **changes))
