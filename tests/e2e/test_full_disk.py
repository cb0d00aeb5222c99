"""A disk that is full: what was saved stays whole, the run says so and ends; given room, the same command goes on."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.disks import disk, resize
from tests.kills import (
    EXAMPLES,
    assert_equal_runs,
    attempts,
    command,
    finish,
    last_step,
    options,
    pictures,
    require_each_once,
    started,
    whole_run,
)
from trainer.checkpoint import store

MEGABYTES = 32
"""A checkpoint of the model has 12, the model file 6: two checkpoints fit, a third does not before one is removed."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with disk(tmp_path / "disk", f"{MEGABYTES}m") as root:
        yield root


def fill(disk: Path) -> None:
    """Leave no room at all."""
    with (disk / "something else").open("wb", buffering=0) as file:
        try:
            while file.write(b"\\0" * 4096):
                pass
        except OSError:
            return


def whole_checkpoints(folder: Path) -> list[int]:
    """Return the steps of the checkpoints, each of which is read and checked."""
    paths = sorted((folder / "checkpoints").iterdir())
    assert not [path for path in paths if path.is_dir() and store.CheckpointId.of(path.name) is None]
    return [store.read(path).state.step for path in paths if path.is_dir()]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [pytest.param("python", marks=pytest.mark.soak), 2])
def test_a_full_disk_ends_the_run_in_one_sentence_and_loses_nothing_that_was_saved(
    processes: str | int, small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = small_disk / "run"
    arguments = options(pictures(tmp_path_factory), folder)
    said = finish(
        command(processes, *arguments), folder, code=2 if processes == "python" else 1, logs=small_disk.parent
    )
    assert said.count("could not be saved") == 1
    assert "No space left on device" in said
    assert "make room, and the same command goes on from there" in said
    if processes == "python":
        assert "Traceback" not in said
    saved = whole_checkpoints(folder)
    print(f"the disk was full after step {last_step(folder)}; saved are {saved}")
    assert saved == [2, 4]
    (record,) = attempts(folder)
    assert record["state"] == "failed"
    assert "could not be saved" in record["reason"]

    resize(small_disk, "200m")
    said = finish(command(processes, *arguments), folder, logs=small_disk.parent)
    assert "(step 4)" in said
    require_each_once(folder)
    assert_equal_runs(folder, whole_run(tmp_path_factory, processes))


@pytest.mark.slow
def test_figures_that_cannot_be_written_end_the_run_too(
    small_disk: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = small_disk / "run"
    # Without a checkpoint on the way, the figures are the first to need another page of the disk: at their 20th row.
    quiet = {"run__audit": "false", "checkpoint__every": "null", "train__batch_size": 1, "train__epochs": 1}
    arguments = command("python", *options(pictures(tmp_path_factory), folder, **quiet))
    with started(arguments, folder, logs=small_disk.parent) as run:
        run.wait(lambda: last_step(folder) >= 1, "a step")
        fill(small_disk)
        print(f"full after step {last_step(folder)}")
        said = run.end(code=2)
    assert "error: " in said
    assert "the figures could not be written (No space left on device)" in said
    assert "Traceback" not in said
    assert last_step(folder) < EXAMPLES, "it ended at once"
