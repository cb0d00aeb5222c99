"""`--debug` and `regraft preview`."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from regraft.contract import OUTPUT_MARK
from tests.e2e.conftest import Options, Train
from tests.folders import image_folder
from tests.launching import MAIN, run, torchrun
from trainer.commands.preview import preview
from trainer.data import dataset
from trainer.data.decode import decode
from trainer.errors import UserError


def test_debug_prints_every_step_and_writes_nothing(
    options: Options, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: set[int] = set()

    def record_process(path: str) -> Any:
        pids.add(os.getpid())
        return decode(path)

    monkeypatch.setattr(dataset, "decode", record_process)
    output = train(0, ["--debug", *options(optim__lr=0.002, data__num_workers=2)])
    for step in ("data", "model", "first batch", "normalize", "forward, layer by layer", "train on 3 batches"):
        assert step in output
    assert "images: uint8 [8, 3, 32, 32]" in output
    assert "stage4" in output
    assert "evaluated 8 images of test" in output
    assert "NOT" not in output
    assert output.count(" ms") > 10
    assert not (tmp_path / "run").exists()
    assert pids == {os.getpid()}, "a debugger stops only in the process that owns the terminal"


@pytest.mark.slow
def test_debug_runs_in_one_of_several_processes_and_reports_if_the_loss_does_not_decrease(
    options: Options, tmp_path: Path
) -> None:
    output = run([*torchrun(2, MAIN), "--debug", *options(optim__lr=1e-12)], cwd=tmp_path)
    assert output.count("evaluated 8 images of test") == 1
    assert "device cpu x 1" in output
    assert "NOT" in output


@pytest.fixture
def preview_options(tmp_path: Path) -> list[str]:
    """Return the options of a preview of 11 images of one class and 3 of the other, with unusual names."""
    folder = image_folder(tmp_path / "data", {"train": {"$x_1$": 12, "图片": 3}, "val": {"$x_1$": 1}})
    return [f"--data.root={folder}", "--data.image_size=32", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"]


def test_preview_draws_a_grid_of_original_and_augmented_images(
    preview_options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "new" / "preview.png"
    assert preview([*preview_options, f"--output={path}"]) == path
    printed = capsys.readouterr().out
    assert str(path) in printed
    assert "2 classes" in printed
    with Image.open(path) as image:
        drawn = np.asarray(image.convert("RGB"))
    colored = (np.ptp(drawn.astype(int), axis=2) > 12).sum(axis=1) > 100  # captions are black on white
    bands = (np.diff(np.concatenate([[0], colored.astype(int)])) == 1).sum()
    assert bands == 4, "two rows of images for each class"
    assert not (tmp_path / "run").exists()
    assert preview(preview_options) == tmp_path / "run" / "preview.png"
    assert (tmp_path / "run" / OUTPUT_MARK).exists(), "the folder is never read as data"


def test_preview_has_every_class_and_random_erasing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    classes = {f"{number:02}": 1 + 9 * (number == 1) for number in range(26)}
    folder = image_folder(tmp_path / "data", {"train": classes, "val": {"00": 1}})
    drawn: list[Any] = []
    monkeypatch.setattr(
        "trainer.commands.preview.write_image_grid", lambda samples, path, title: drawn.extend([samples, title])
    )
    options = [f"--data.root={folder}", "--data.image_size=32", "--data.random_erasing=1"]
    preview([*options, "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    samples, title = drawn
    assert title == (
        "training images of the first 24 of 26 classes; below each row, as seen in epoch 1 "
        "(basic, random erasing, 32 px)"
    )
    assert [row.caption for row in samples[:3]] == ["00 (1)", "01 (10)", "02 (1)"]
    assert [len(row.originals) for row in samples] == [1, 8, *[1] * 22]

    def is_erased(image: Image.Image) -> bool:
        return bool((np.asarray(image) == [124, 116, 104]).all(axis=2).sum() >= 8)

    assert not any(is_erased(image) for row in samples for image in row.originals)
    assert all(is_erased(image) for row in samples for image in row.augmented)


def test_preview_names_a_file_that_cannot_be_read_or_written(preview_options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        preview([*preview_options, "--output=/proc/no/p.png"])
    (tmp_path / "data" / "train" / "图片" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"图片/000\.png"):
        preview(preview_options)
