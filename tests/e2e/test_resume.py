"""What a start does with the run that it finds; tests/e2e/test_commands.py has the rest of it."""

import shutil
from pathlib import Path

import pytest

from tests.folders import image_folder
from tests.kills import (
    EPOCHS,
    STEPS,
    assert_equal_runs,
    command,
    finish,
    newest,
    options,
    pictures,
    require_each_once,
    started,
    whole_run,
)


def python(root: Path, folder: Path, **changes: object) -> list[str]:
    return command("python", *options(root, folder, **changes))


def contents(folder: Path) -> dict[str, bytes]:
    """Return all that counts of a run: whatever a start that does nothing may not change."""
    kept = [
        path
        for path in folder.rglob("*")
        if path.is_file() and path.parent.name not in ("attempts", "environment")
    ]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


@pytest.mark.slow
def test_a_finished_run_is_extended_and_guarded_against_other_pictures(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root, folder = pictures(tmp_path_factory), tmp_path / "run"
    constant = {"optim__schedule": "constant"}
    finish(python(root, folder, **constant, train__epochs=2), folder)
    said = finish([*python(root, folder, **constant), "--run.resume=must"], folder)
    assert f"going on after epoch 2 of {EPOCHS} (step {2 * STEPS})" in said
    require_each_once(folder)
    assert_equal_runs(folder, whole_run(tmp_path_factory, "python", **constant))
    before = contents(folder)

    others = tmp_path / "other pictures"
    shutil.copytree(root, others)
    (others / "train" / "b" / "003.png").unlink()
    image_folder(others, {"train": {"d": 2}}, seed=8)
    said = finish(python(others, folder, **constant), folder, code=2)
    assert "training images: b 7 there, 6 now" in said
    assert "classes: none only there, d only now" in said
    assert "Traceback" not in said
    assert contents(folder) == before


@pytest.mark.soak
def test_a_damaged_checkpoint_is_set_aside_and_the_run_ends_equal(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    arguments = python(pictures(tmp_path_factory), folder)
    with started(arguments, folder) as run:
        run.wait_for_step(9)
        run.process.terminate()
        run.end(code=75)
    damaged = newest(folder)
    with (damaged / "optimizer.safetensors").open("r+b") as file:
        file.seek(-1, 2)
        last = file.read(1)
        file.seek(-1, 2)
        file.write(bytes([last[0] ^ 1]))
    (_, before) = sorted((folder / "checkpoints").glob("step-*"), reverse=True)[:2]
    said = finish(arguments, folder)
    assert f"(step {int(before.name.split('-')[1])})" in said
    assert f"{damaged} is damaged (optimizer.safetensors is not what was written" in said
    assert f"set aside as damaged-1-{damaged.name}" in said
    assert (folder / "checkpoints" / f"damaged-1-{damaged.name}").is_dir()
    assert "Traceback" not in said
    require_each_once(folder)
    assert_equal_runs(folder, whole_run(tmp_path_factory, "python"))
