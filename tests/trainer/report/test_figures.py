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


@pytest.mark.parametrize(
    "drawn",
    [rows(5, 5), rows(1, 1, loss=0.3), rows(3, 2, loss=7.0), rows(3, 4, val=True)],
    ids=["the note's", "one batch in all", "many classes", "with a selection part"],
)
def test_curves_are_drawn(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves([], tmp_path / "nothing_yet.png", title="")
    draw_curves(drawn, tmp_path / "curves.png", title="a_b $x ^ 图")
    assert blue_pixels(tmp_path / "curves.png") > blue_pixels(tmp_path / "nothing_yet.png") + 20
