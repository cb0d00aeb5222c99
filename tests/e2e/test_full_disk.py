"""A full disk: saved checkpoints stay complete, and the run ends; with more space, the same command resumes."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import runs
from tests.disks import disk, resize
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    # Initial weights take 6 MB and a checkpoint 18: there is no space for a third before the first is removed.
    with disk(tmp_path / "disk", "46m") as root:
        yield root


def fill(root: Path) -> None:
    """Leave no free space."""
    with (root / "filler").open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"\0" * 4096):
            pass


def complete_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the checkpoints; each is read and checked."""
    paths = sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert all(CheckpointId.of(path.name) for path in paths)
    return [store.read(path).state.step for path in paths]


@pytest.mark.slow
def test_a_full_disk_ends_the_run_and_loses_nothing_that_was_saved(
    small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder, logs = small_disk / "run", small_disk.parent
    arguments = runs.options(tmp_path_factory, folder, **runs.ALL_FEATURES)
    output = runs.finish(runs.command(2, *arguments), folder, code=1, logs=logs)
    assert output.count("could not be saved") == 1
    assert "No space left on device" in output
    assert complete_checkpoints(folder) == [2, 4]
    (record,) = runs.attempts(folder)
    assert record["state"] == "failed"
    assert "could not be saved" in record["reason"]

    resize(small_disk, "200m")
    assert "(step 4)" in runs.finish(runs.command(2, *arguments), folder, logs=logs)
    runs.assert_each_example_once(folder)
    runs.assert_equal(folder, runs.uninterrupted(tmp_path_factory, 2, **runs.ALL_FEATURES))


@pytest.mark.slow
def test_metrics_that_cannot_be_written_end_the_run(small_disk: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = small_disk / "run"
    # Without checkpoints, the metrics are the first to need another page of the disk, at their 20th row.
    changes = {"run__audit": "false", "checkpoint__every": "null", "train__batch_size": 1, "train__epochs": 1}
    arguments = runs.command("python", *runs.options(tmp_path_factory, folder, **changes))
    with runs.start(arguments, folder, logs=small_disk.parent) as run:
        run.wait(lambda: runs.last_step(folder) >= 1, "a step")
        fill(small_disk)
        output = run.end(code=2)
    assert "error: " in output
    assert "could not be written (No space left on device)" in output
    assert "Traceback" not in output
    assert runs.last_step(folder) < runs.EXAMPLES, "it trained on"
