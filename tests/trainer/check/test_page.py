"""The page of `regraft check`: size and hostile names; tests/trainer/pages/test_browser.py opens it in Chromium."""

from pathlib import Path

import pytest

from tests.trainer.check.example_result import example_result
from tests.trainer.pages.test_pages import HOSTILE, Elements
from trainer.check.page import render_page


def test_names_add_no_elements(tmp_path: Path) -> None:
    hostile, plain = (
        Elements(render_page(example_result(tmp_path / name, classes, files=["a.png", "b.png"])))
        for name, classes in (("hostile", HOSTILE), ("plain", [f"class {number}" for number in range(len(HOSTILE))]))
    )
    assert (hostile.tags, hostile.attributes) == (plain.tags, plain.attributes)
    assert not {"onerror", "onclick"} & hostile.attributes


@pytest.mark.parametrize("count", [1000])
def test_the_page_of_1000_images_has_at_most_5_mb(count: int, tmp_path: Path) -> None:
    names = [f"{number} with a long name{'.' * 150}.png" for number in range(20)]
    result = example_result(tmp_path / "data", [f"class {n}" for n in range(200)], files=names, count=count, groups=600)
    page = render_page(result)
    assert 2_000_000 < len(page.encode()) <= 5_000_000
    assert "540 more groups are in the file of --json" in page
