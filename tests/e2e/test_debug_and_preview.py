"""`--debug` and `regraft preview`."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

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
    assert bands == 3, "a row of images for each class"
    assert not (tmp_path / "run").exists()


def test_preview_draws_few_images_and_unusual_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"$x_1$": 2, "图片": 1}, "val": {"$x_1$": 1}})
    written = preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    assert written == tmp_path / "run" / "preview.png"
    assert read_rgb(written).width > 500


def test_preview_has_every_class_and_random_erasing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {f"{number:02}": 1 + 5 * (number == 1) for number in range(26)}
    folder = image_folder(tmp_path / "data", {"train": classes, "val": {"00": 1}})
    drawn: list[Any] = []
    monkeypatch.setattr(
        "trainer.commands.preview.write_image_grid", lambda samples, path, titles: drawn.extend([samples, titles])
    )
    options = [f"--data.root={folder}", "--data.image_size=32", "--data.random_erasing=1"]
    preview([*options, "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    samples, titles = drawn
    assert titles == (
        "training images of the first 24 of 26 classes",
        "as seen in epoch 1 (basic, random erasing, 32 px)",
    )
    assert [row.caption for row in samples[:3]] == ["00 (1)", "01 (6)", "02 (1)"]
    assert [len(row.originals) for row in samples] == [1, 4, *[1] * 22]

    def is_erased(image: Image.Image) -> bool:
        return bool((np.asarray(image) == [124, 116, 104]).all(axis=2).sum() >= 8)

    assert not any(is_erased(image) for row in samples for image in row.originals)
    assert all(is_erased(image) for row in samples for image in row.augmented)


def test_preview_names_a_file_that_cannot_be_read_or_written(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1}})
    (folder / "train" / "a" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/000\.png"):
        preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        preview([f"--data.root={folder}", "--data.on_unreadable=skip", "--output=/proc/no/p.png"])
