"""A full disk: saved checkpoints stay complete, the run reports it and ends; with more space, the same command resumes."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import disk, resize
from tests.kills import (
    ALL_FEATURES,
    EXAMPLES,
    assert_each_example_once,
    assert_equal_runs,
    attempts,
    command,
    finish,
    last_step,
    make_images,
    options,
    start_run,
    uninterrupted_run,
)
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId

MEGABYTES = 34
"""The initial weights take 6 MB and each checkpoint 12: there is space for two, and none for a third before one is removed."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", f"{MEGABYTES}m") as root:
        yield root


def fill(root: Path) -> None:
    """Leave no free space."""
    with (root / "filler").open("wb", buffering=0) as file:
        try:
            while file.write(b"\0" * 4096):
                pass
        except OSError:
            return


def complete_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the checkpoints; each is read and checked."""
    paths = sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert all(CheckpointId.of(path.name) for path in paths)
    return [store.read(path).state.step for path in paths]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [pytest.param("python", marks=pytest.mark.soak), 2])
def test_a_full_disk_ends_the_run_and_loses_nothing_that_was_saved(
    launcher: str | int, small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, logs = small_disk / "run", small_disk.parent
    arguments = options(make_images(tmp_path_factory), folder, **ALL_FEATURES)
    output = finish(command(launcher, *arguments), folder, code=2 if launcher == "python" else 1, logs=logs)
    assert output.count("could not be saved") == 1
    assert "No space left on device" in output
    if launcher == "python":
        assert "Traceback" not in output
    assert complete_checkpoints(folder) == [2, 4]
    (record,) = attempts(folder)
    assert record["state"] == "failed"
    assert "could not be saved" in record["reason"]

    resize(small_disk, "200m")
    assert "(step 4)" in finish(command(launcher, *arguments), folder, logs=logs)
    assert_each_example_once(folder)
    assert_equal_runs(folder, uninterrupted_run(tmp_path_factory, launcher, **ALL_FEATURES))


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run(
    small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = small_disk / "run"
    # No checkpoint is written on the way: the metrics are the first to need another page of the disk, at their 20th row.
    changes = {"run__audit": "false", "checkpoint__every": "null", "train__batch_size": 1, "train__epochs": 1}
    arguments = command("python", *options(make_images(tmp_path_factory), folder, **changes))
    with start_run(arguments, folder, logs=small_disk.parent) as run:
        run.wait(lambda: last_step(folder) >= 1, "a step")
        fill(small_disk)
        output = run.end(code=2)
    assert "error: " in output
    assert "could not be written (No space left on device)" in output
    assert "Traceback" not in output
    assert last_step(folder) < EXAMPLES, "it trained on"
