import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from PIL import Image

from tests.launching import REPOSITORY
from trainer.report.figures import draw_curves, try_write_figure, write_figure

ROWS: list[dict[str, Any]] = [
    {"kind": "start", "epoch": 0, "test_accuracy": 0.3, "test_loss": 3.0},
    {"kind": "train", "epoch": 0.5, "train_loss": 7.0, "train_accuracy": 0.2},
    {"kind": "train", "epoch": 1, "train_loss": 2.0, "train_accuracy": 0.6},
    {"kind": "epoch", "epoch": 1, "train_loss": 2.0, "test_accuracy": 0.5, "test_loss": 1.5},
]


def lines(rows: list[dict[str, Any]]) -> dict[str, list[tuple[float, float]]]:
    """Return label -> points of the curves."""
    figure = Figure()
    draw_curves(rows, figure, title="$a_b")
    loss, accuracy = figure.axes
    assert (loss.get_ylabel(), accuracy.get_ylabel(), accuracy.get_xlabel()) == ("loss", "accuracy", "epoch")
    assert loss.get_title() == "$a_b"
    drawn = [*loss.lines, *accuracy.lines]
    assert [str(line.get_label()).split()[1] for line in drawn] == ["loss"] * len(loss.lines) + ["accuracy"] * len(
        accuracy.lines
    )
    return {str(line.get_label()): line.get_xydata().tolist() for line in drawn}


def test_curves_have_losses_and_accuracies_of_all_splits() -> None:
    assert lines(ROWS) == {
        "train loss": [[0.5, 7], [1, 2]], "test loss": [[0, 3], [1, 1.5]],
        "train accuracy": [[0.5, 0.2], [1, 0.6]], "test accuracy": [[0, 0.3], [1, 0.5]],
    }  # fmt: skip
    with_val = lines([{**row, "val_loss": 1.0, "val_accuracy": 0.5} for row in ROWS[3:]])
    assert with_val["val loss"] == [[1, 1]]
    assert lines([]) == {}


def test_figure_is_the_same_whatever_matplotlib_is_told(tmp_path: Path) -> None:
    program = (
        "import sys; from functools import partial; from pathlib import Path\n"
        "from trainer.report.figures import draw_curves, write_figure\n"
        f"write_figure(Path(sys.argv[1]), partial(draw_curves, {ROWS}, title='a_b $x ^ 图'), size=(6.4, 5.6))"
    )
    (tmp_path / "matplotlibrc").write_text("text.usetex: true\nbackend: nosuch\nfont.family: Nowhere\nlines.color: w\n")
    settings = {"MATPLOTLIBRC": str(tmp_path / "matplotlibrc"), "MPLCONFIGDIR": "/proc/nowhere"}
    for name, changes in {"own": settings | {"MPLBACKEND": "module://nosuch"}, "plain": {}}.items():
        command = [sys.executable, "-c", program, str(tmp_path / name)]
        subprocess.run(command, cwd=REPOSITORY, env={**os.environ, **changes}, check=True)
    assert (tmp_path / "own").read_bytes() == (tmp_path / "plain").read_bytes()
    with Image.open(tmp_path / "own") as image:
        assert image.format == "PNG"
        assert image.size == (960, 840)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left"), RuntimeError("no latex"), ImportError("x")])
def test_figure_that_fails_is_a_warning(error: Exception, tmp_path: Path) -> None:
    def fail(figure: Figure) -> None:
        raise error

    warnings: list[str] = []
    write_figure(tmp_path / "curves.png", lambda figure: None, size=(1, 1))
    before = (tmp_path / "curves.png").read_bytes()
    try_write_figure(tmp_path / "curves.png", fail, size=(1, 1), warn=warnings.append)
    assert warnings == [
        f"warning: curves.png was not drawn ({type(error).__name__}: {error}); nothing else is affected"
    ]
    assert (tmp_path / "curves.png").read_bytes() == before
