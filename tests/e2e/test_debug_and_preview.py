"""`--debug` and `regraft preview`."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from regraft.contract import OUTPUT_MARK
from tests.e2e.conftest import Options
from tests.folders import image_folder
from tests.launching import MAIN, REPOSITORY, run, torchrun
from trainer.commands.preview import preview
from trainer.errors import UserError

REGRAFT = [sys.executable, "-m", "launch.cli"]


@pytest.mark.slow
def test_debug_prints_every_step_and_writes_nothing(options: Options, tmp_path: Path) -> None:
    arguments = options(optim__lr=0.002, data__num_workers=2)
    output = run([*REGRAFT, "debug", *arguments], cwd=tmp_path)
    for step in ("data", "model", "first batch", "normalize", "forward, layer by layer", "train on 3 batches"):
        assert step in output
    assert "images: uint8 [8, 3, 32, 32]" in output
    assert "stage4" in output
    assert "evaluated 8 images of test" in output
    assert "NOT" not in output
    assert output.count(" ms") > 10
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_debug_runs_in_one_of_several_processes_and_reports_if_the_loss_does_not_decrease(
    options: Options, tmp_path: Path
) -> None:
    output = run([*torchrun(2, MAIN), "--debug", *options(optim__lr=1e-12)], cwd=tmp_path)
    assert output.count("evaluated 8 images of test") == 1
    assert "device cpu x 1" in output
    assert "NOT" in output


@pytest.mark.slow
def test_a_debugger_stops_in_the_transform_of_the_training_data(options: Options, tmp_path: Path) -> None:
    # The transform runs in the process that owns the terminal, although workers are configured.
    program = tmp_path / "debugged.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import trainer.data.dataset as dataset\n"
        "apply_seeded = dataset.apply_seeded\n"
        "def stop(*arguments):\n"
        "    sys.breakpointhook = lambda: print('in the debugger')\n"
        "    breakpoint()\n"
        "    return apply_seeded(*arguments)\n"
        "dataset.apply_seeded = stop\n"
        "from trainer.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    output = run([sys.executable, program, "--debug", *options(data__num_workers=2)], cwd=tmp_path)
    assert "in the debugger" in output


def read_rgb(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.slow
def test_preview_draws_a_grid_of_original_and_augmented_images(options: Options, tmp_path: Path) -> None:
    path = tmp_path / "new" / "preview.png"
    output = run([*REGRAFT, "preview", *options(), "--output", path], cwd=REPOSITORY)
    assert str(path) in output
    assert "3 classes" in output
    drawn = np.asarray(read_rgb(path))
    colored = (np.ptp(drawn.astype(int), axis=2) > 12).sum(axis=1) > 100  # captions are black on white
    bands = (np.diff(np.concatenate([[0], colored.astype(int)])) == 1).sum()
    assert bands == 4, "four rows of images"
    assert not (tmp_path / "run").exists()


def test_preview_draws_few_images_and_unusual_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"$x_1$": 2, "图片": 1}, "val": {"$x_1$": 1}})
    written = preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    assert written == tmp_path / "run" / "preview.png"
    assert (tmp_path / "run" / OUTPUT_MARK).exists(), "the folder is never read as data"
    assert read_rgb(written).width > 500


def test_preview_shows_random_erasing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 1}})
    drawn: list[tuple[str, list[Image.Image]]] = []
    monkeypatch.setattr("trainer.commands.preview.draw", lambda rows, path: drawn.extend(rows))
    options = [f"--data.root={folder}", "--data.image_size=32", "--data.random_erasing=1"]
    preview([*options, "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    mean = [124, 116, 104]

    def is_erased(images: list[Image.Image]) -> list[bool]:
        return [bool((np.asarray(image) == mean).all(axis=2).sum() >= 8) for image in images]

    (_, originals), _, (caption, augmented), (_, others) = drawn
    assert "basic, random erasing, 32 px" in caption
    assert is_erased(originals) == [False] * 3
    assert is_erased([*augmented, *others]) == [True] * 6


def test_preview_names_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1}})
    (folder / "train" / "a" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/000\.png"):
        preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        preview([f"--data.root={folder}", "--data.on_unreadable=skip", "--output=/proc/no/p.png"])
