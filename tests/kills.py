"""Old names of tests/runs.py, for tests that were renamed on other branches."""

from pathlib import Path

from tests import runs
from tests.runs import (  # noqa: F401
    EXAMPLES,
    STEPS,
    Run,
    attempts,
    children,
    command,
    finish,
    last_step,
    saved_step,
)

SAME_ANYWHERE = runs.WORLD_SIZE_INDEPENDENT
pictures, started, whole_run, catches = runs.images, runs.start, runs.uninterrupted, runs.handles_signal
require_each_once, trained_by = runs.assert_each_example_once, runs.training_attempt


def require_close(found: Path, expected: Path, *, losses: float, weights: float) -> None:
    runs.assert_close(found, expected)
