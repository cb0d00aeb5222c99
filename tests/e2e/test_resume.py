"""What a start does with the run that it finds in its folder."""

import shutil
from pathlib import Path

from tests import runs
from tests.e2e.conftest import Options, Train
from tests.folders import image_folder


def contents(folder: Path) -> dict[str, bytes]:
    """Return the files of a run, without the records of its starts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    kept = [path for path in files if path.parent.name not in ("attempts", "environment")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in kept}


def test_a_finished_run_is_extended_and_its_config_runs_the_same_again(
    options: Options, images: Path, tmp_path: Path, train: Train
) -> None:
    folder, changes = tmp_path / "run", {"optim__schedule": "constant", "run__audit": "true"}
    train(0, options(train__epochs=1, **changes))
    output = train(0, options(train__epochs=2, run__resume="must", **changes))
    assert "resuming after epoch 1 of 2 (step 3)" in output
    again = [f"--config={folder / 'config.yaml'}", f"--run.dir={tmp_path / 'again'}", "--run.resume=auto"]
    train(0, again)
    runs.assert_equal(folder, tmp_path / "again")

    before, others = contents(folder), tmp_path / "other images"
    shutil.copytree(images, others)
    (others / "train" / "c" / "003.png").unlink()
    image_folder(others, {"train": {"d": 2}}, seed=8)
    output = train(2, options(data__root=others, **changes))
    assert "training images: c 6 there, 5 now" in output
    assert "classes: none only there, d only now" in output
    assert contents(folder) == before


def test_a_damaged_checkpoint_is_quarantined_and_the_run_ends_equal(
    options: Options, tmp_path: Path, train: Train
) -> None:
    folder, changes = tmp_path / "run", {"run__audit": "true", "checkpoint__every": "1 steps"}
    train(0, options(**changes))
    shutil.copytree(folder, tmp_path / "whole")
    damaged = runs.latest_checkpoint(folder)
    content = bytearray((damaged / "optimizer.safetensors").read_bytes())
    content[-1] ^= 1
    (damaged / "optimizer.safetensors").write_bytes(content)
    output = train(0, options(**changes))
    assert f"{damaged} is damaged (optimizer.safetensors was changed: its SHA-256 differs" in output
    assert f"as damaged-1-{damaged.name}" in output
    assert "(step 5), in epoch 2 after 2 of its 3 steps" in output
    assert (folder / "checkpoints" / f"damaged-1-{damaged.name}").is_dir()
    runs.assert_equal(folder, tmp_path / "whole")
