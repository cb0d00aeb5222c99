from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from trainer.report.figures import draw_curves


def rows(epochs: int, steps: int, *, loss: float = 1.0, val: bool = False) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for epoch in range(epochs):
        for step in range(1, steps + 1):
            x = epoch + step / steps
            rows.append({"kind": "train", "epoch": x, "train_loss": loss / x, "train_accuracy": x / epochs})
        evaluation = {"test_accuracy": 0.5} | ({"val_accuracy": 0.4} if val else {})
        rows.append({"kind": "epoch", "epoch": epoch + 1, **evaluation})
    return rows


def blue_pixels(path: Path) -> int:
    """Return the number of blue pixels: the train loss and its legend entry."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        pixels = np.asarray(image.convert("RGB")).astype(int)
    return int((pixels[..., 2] - pixels[..., 0] > 80).sum())


@pytest.mark.parametrize(
    "drawn",
    [rows(5, 5), rows(1, 1, loss=0.3), rows(3, 2, loss=7.0), rows(3, 4, val=True)],
    ids=["d2l recipe", "single batch", "many classes", "with val split"],
)
def test_curves_are_drawn(drawn: list[dict[str, Any]], tmp_path: Path) -> None:
    draw_curves([], tmp_path / "empty.png", title="")
    draw_curves(drawn, tmp_path / "curves.png", title="a_b $x ^ 图")
    assert blue_pixels(tmp_path / "curves.png") > blue_pixels(tmp_path / "empty.png") + 20


def test_evaluation_before_the_first_step_is_drawn_at_epoch_0(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Any] = []
    monkeypatch.setattr("trainer.report.figures.save_figure", lambda figure, path, dpi: figures.append(figure))
    start = {"kind": "start", "epoch": 0, "test_accuracy": 0.3, "val_accuracy": 0.2}
    draw_curves([start, *rows(2, 1, val=True)], tmp_path / "curves.png", title="")
    draw_curves(rows(2, 1), tmp_path / "curves.png", title="")
    with_start, without = (
        {str(line.get_label()): list(line.get_xdata()) for line in figure.axes[0].lines} for figure in figures
    )
    assert with_start["test accuracy"] == with_start["val accuracy"] == [0, 1, 2]
    assert without["test accuracy"] == [1, 2]
