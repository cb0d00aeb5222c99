"""`--debug` and `regraft preview`."""

import os
from collections.abc import Sequence
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
from trainer.data.augment import apply_seeded
from trainer.errors import UserError
from trainer.report.image_grid import ClassSamples


def test_debug_prints_every_step_and_writes_nothing(
    options: Options, tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids: set[int] = set()

    def record_process(*arguments: Any) -> Any:
        pids.add(os.getpid())
        return apply_seeded(*arguments)

    monkeypatch.setattr(dataset, "apply_seeded", record_process)
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
    """Return the options of a preview of 8 images of one class and 3 of the other, with unusual names."""
    folder = image_folder(tmp_path / "data", {"train": {"$x_1$": 9, "图片": 3}, "val": {"$x_1$": 1}})
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
    assert bands == 2, "a row of images for each class"
    assert not (tmp_path / "run").exists()
    assert preview(preview_options) == tmp_path / "run" / "preview.png"
    assert (tmp_path / "run" / OUTPUT_MARK).exists(), "the folder is never read as data"


def test_preview_shows_random_erasing(preview_options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[ClassSamples] = []
    shown: list[str] = []

    def record(samples: Sequence[ClassSamples], path: Path, *, titles: Sequence[str]) -> None:
        rows.extend(samples)
        shown.extend(titles)

    monkeypatch.setattr("trainer.commands.preview.write_image_grid", record)
    preview([*preview_options, "--data.random_erasing=1"])
    mean = [124, 116, 104]

    def is_erased(images: Sequence[Image.Image]) -> list[bool]:
        return [bool((np.asarray(image) == mean).all(axis=2).sum() >= 8) for image in images]

    assert "basic, random erasing, 32 px" in shown[1]
    assert [is_erased(row.originals) for row in rows] == [[False] * 4, [False] * 3]
    assert [is_erased(row.augmented) for row in rows] == [[True] * 4, [True] * 3]


def test_preview_names_a_file_that_cannot_be_read_or_written(preview_options: list[str], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        preview([*preview_options, "--output=/proc/no/p.png"])
    (tmp_path / "data" / "train" / "图片" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"图片/000\.png"):
        preview(preview_options)
