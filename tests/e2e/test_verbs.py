"""`--debug` and `python -m trainer.commands.preview`."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.conftest import Options
from tests.folders import image_folder
from tests.launching import MAIN, REPOSITORY, accelerate_launch, run, torchrun
from trainer.commands.preview import preview
from trainer.errors import UserError


@pytest.mark.slow
def test_debug_shows_every_stage_and_writes_nothing(options: Options, tmp_path: Path) -> None:
    arguments = options(optim__lr=0.05, data__workers=2)
    said = run([*accelerate_launch("--num_processes", 1, MAIN), "--debug", *arguments], cwd=tmp_path)
    for stage in (
        "data",
        "model",
        "first batch",
        "normalise",
        "forward, layer by layer",
        "train on 3 batches",
    ):
        assert stage in said
    assert "images: uint8 [8, 3, 32, 32]" in said
    assert "stage4" in said
    assert "evaluated 8 images of test" in said
    assert "it goes down" in said
    assert said.count(" ms") > 10
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_debug_says_so_where_nothing_is_learnt(options: Options, tmp_path: Path) -> None:
    regraft = [sys.executable, "-m", "launch.cli"]
    said = run([*regraft, "debug", *options(optim__lr=1e-12)], cwd=tmp_path)
    assert "does NOT go down" in said


@pytest.mark.slow
def test_debug_is_one_process_however_many_are_started(options: Options, tmp_path: Path) -> None:
    said = run([*torchrun(2, MAIN), "--debug", *options(optim__lr=0.05)], cwd=tmp_path)
    assert said.count("evaluated 8 images of test") == 1
    assert "device cpu x 1" in said


@pytest.mark.slow
def test_a_debugger_can_be_entered(options: Options, tmp_path: Path) -> None:
    # A breakpoint in the training data's own transform: it is reached in the very process that holds the terminal.
    program = tmp_path / "debugged.py"
    program.write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(REPOSITORY)!r})\n"
        "import trainer.data.loader as loader\n"
        "seeded = loader.apply_seeded\n"
        "def stop(*arguments):\n"
        "    sys.breakpointhook = lambda: print('in the debugger')\n"
        "    breakpoint()\n"
        "    return seeded(*arguments)\n"
        "loader.apply_seeded = stop\n"
        "from trainer.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    said = run([sys.executable, program, "--debug", *options(data__workers=2)], cwd=tmp_path)
    assert "in the debugger" in said


def colours(path: Path) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")


@pytest.mark.slow
def test_the_preview_is_the_notes_grid_and_the_augmented_pictures(options: Options, tmp_path: Path) -> None:
    said = run(
        [
            sys.executable,
            "-m",
            "trainer.commands.preview",
            *options(),
            "--output",
            tmp_path / "new" / "p.png",
        ],
        cwd=REPOSITORY,
    )
    assert str(tmp_path / "new" / "p.png") in said
    assert "3 classes" in said
    drawn = np.asarray(colours(tmp_path / "new" / "p.png"))
    coloured = (np.ptp(drawn.astype(int), axis=2) > 12).sum(axis=1) > 100  # captions are black on white
    bands = (np.diff(np.concatenate([[0], coloured.astype(int)])) == 1).sum()
    assert bands == 4, "four rows of pictures"
    assert not (tmp_path / "run").exists()


def test_the_preview_draws_few_pictures_and_odd_names(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"$x_1$": 2, "图片": 1}, "val": {"$x_1$": 1}})
    written = preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    assert written == tmp_path / "run" / "preview.png"
    assert colours(written).width > 500


def test_the_preview_shows_what_is_erased(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 1}})
    drawn: list[tuple[str, list[Image.Image]]] = []
    monkeypatch.setattr("trainer.commands.preview.draw", lambda rows, path: drawn.extend(rows))
    preview(
        [
            *(f"--data.root={folder}", "--data.image_size=32", "--data.random_erasing=1"),
            *("--model.weights=null", f"--run.dir={tmp_path / 'run'}"),
        ]
    )
    mean = [124, 116, 104]

    def erased(pictures: list[Image.Image]) -> list[bool]:
        return [bool((np.asarray(picture) == mean).all(axis=2).sum() >= 8) for picture in pictures]

    (_, seen), _, (caption, augmented), (_, others) = drawn
    assert "recipe, random erasing, 32 px" in caption
    assert erased(seen) == [False] * 3
    assert erased([*augmented, *others]) == [True] * 6


def test_the_preview_names_what_it_cannot_draw(tmp_path: Path) -> None:
    folder = image_folder(tmp_path / "data", {"train": {"a": 2, "b": 2}, "val": {"a": 1}})
    (folder / "train" / "a" / "000.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a/000\.png"):
        preview([f"--data.root={folder}", "--model.weights=null", f"--run.dir={tmp_path / 'run'}"])
    with pytest.raises(UserError, match=r"--output .* cannot be written"):
        preview([f"--data.root={folder}", "--data.on_unreadable=skip", "--output=/proc/no/p.png"])
