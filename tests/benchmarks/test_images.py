from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks.images import SIZE, write_photographs


def test_drawn_photographs_cost_as_much_as_real_ones(tmp_path: Path) -> None:
    """Size and sampling decide the time to decode: photographs of this size have 120 KB and full chroma resolution."""
    files = sorted((write_photographs(tmp_path, train=4, val=2, copies=2) / "train").rglob("*.jpg"))
    assert len(files) == 8
    assert len({file.stat().st_ino for file in files}) == 4
    for file in files:
        with Image.open(file) as image:
            assert image.size == SIZE
            assert [part[1:3] for part in image.layer] == [(1, 1)] * 3  # type: ignore[attr-defined]
        assert 80_000 < file.stat().st_size < 160_000


def test_the_classes_of_drawn_photographs_differ_in_color(tmp_path: Path) -> None:
    folder = write_photographs(tmp_path, train=4, val=4)
    red_over_blue = {
        name: np.mean([np.asarray(Image.open(file)).mean(axis=(0, 1)) @ (1, 0, -1) for file in files])
        for name in "ab"
        if (files := list((folder / "val" / name).glob("*.jpg")))
    }
    assert red_over_blue["a"] > 20
    assert red_over_blue["b"] < -20
