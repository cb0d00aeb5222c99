from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.report.figures import draw_curves


def rows(epochs: int, points: int, *, loss: float = 1.0, val: bool = False) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for epoch in range(epochs):
        for point in range(1, points + 1):
            at = epoch + point / points
            found.append(
                {"kind": "train", "epoch": at, "train_loss": loss / at, "train_accuracy": at / epochs}
            )
        found.append(
            {"kind": "epoch", "epoch": epoch + 1, "test_accuracy": 0.5}
            | ({"val_accuracy": 0.4} if val else {})
        )
    return found


def blue_pixels(path: Path) -> int:
    """Return how much there is of the train loss: its line, and its key in the legend."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((pixels[..., 2] - pixels[..., 0] > 80).sum())


def test_the_accuracy_before_the_first_step_is_drawn_at_0(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    found: list[dict[str, list[float]]] = []

    def look(figure: Any, path: Path, *, dpi: int) -> None:
        (axes,) = figure.axes
        found.append({str(line.get_label()): list(line.get_xdata()) for line in axes.lines})

    monkeypatch.setattr("trainer.report.figures.save_figure", look)
    start = {"kind": "start", "epoch": 0, "test_accuracy": 0.3, "val_accuracy": 0.2}
    draw_curves([start, *rows(2, 1, val=True)], tmp_path / "curves.png", title="")
    draw_curves(rows(2, 1), tmp_path / "curves.png", title="")
    assert found[0]["test accuracy"] == found[0]["val accuracy"] == [0, 1, 2]
    assert found[1]["test accuracy"] == [1, 2]


@pytest.mark.parametrize(
    "drawn",
    [rows(5, 5), rows(1, 1, loss=0.3), rows(3, 2, loss=7.0), rows(3, 4, val=True)],
    ids=["the note's", "one batch in all", "many classes", "with a selection part"],
)
def test_curves_are_drawn(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves([], tmp_path / "nothing_yet.png", title="")
    draw_curves(drawn, tmp_path / "curves.png", title="a_b $x ^ 图")
    assert blue_pixels(tmp_path / "curves.png") > blue_pixels(tmp_path / "nothing_yet.png") + 20
