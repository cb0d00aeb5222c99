"""The pages in Chromium: no errors, no overflow, accessible, sortable by keyboard; hostile names run nothing."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium.webdriver.common.keys import Keys

from tests.browser import SCHEMES, WIDTHS, Browser, chromium
from tests.trainer.check.example_result import example_result
from tests.trainer.pages.example_run import write_run
from tests.trainer.pages.test_pages import HOSTILE
from trainer.check.findings import CheckResult
from trainer.check.page import render_page as render_check
from trainer.pages.render import write_page
from trainer.pages.run_comparison import render_comparison
from trainer.pages.run_record import read_run
from trainer.pages.run_report import render_report

LONG = "a_very_long_class_name_without_any_space_that_could_break_a_page_" * 2

AXE_RUNS = {"hostile": {(1280, "light"), (1280, "dark"), (390, "light")}, "check": {(1280, "light"), (390, "dark")}}


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with chromium(tmp_path_factory.mktemp("profile")) as started:
        yield started


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("pages")
    many = [LONG, *(f"species {number}" for number in range(19))]
    hostile = write_run(folder / "1" / "hostile", HOSTILE, images=["<b>.png", '"on.png', "\udce9.png"])
    runs = {
        "hostile": hostile,
        "many": write_run(folder / "2" / "many", many, examples=300, images=["a.png"]),
        "running": write_run(folder / "3" / "running", ("cat", "dog"), finished=False),
        "empty": write_run(folder / "4" / "empty", ("cat", "dog"), epochs=0, finished=False),
    }
    records = {name: read_run(path) for name, path in runs.items()}
    pages = {name: render_report(record) for name, record in records.items()}
    pages["comparison"] = render_comparison([*records.values(), records["hostile"]])
    names = ["<b>.png", '"on.png', "\udce9.png"]
    pages["check"] = render_check(example_result(folder / "check", [*HOSTILE, LONG], files=names))
    pages["check of nothing"] = render_check(CheckResult(root="nothing", classes=(), counts={}))
    for name, page in pages.items():
        write_page(folder / f"{name}.html", page)
    return {name: folder / f"{name}.html" for name in pages}


@pytest.mark.parametrize("name", ["hostile", "many", "running", "empty", "comparison", "check", "check of nothing"])
def test_pages_have_no_errors_no_overflow_and_are_accessible(
    name: str, browser: Browser, pages: dict[str, Path]
) -> None:
    for width in WIDTHS:
        for scheme in SCHEMES:
            browser.open(pages[name], width=width, scheme=scheme)
            assert browser.errors() == []
            assert browser.overflow() == [], (width, scheme)
            if (width, scheme) in AXE_RUNS.get(name, {(1280, "light")}):  # it takes seconds
                assert browser.violations() == [], (width, scheme)
    assert browser.run("return document.querySelectorAll('main script, main img[onerror], [onclick]').length") == 0
    assert browser.run("return performance.getEntriesByType('resource').filter((e) => !/^data:/.test(e.name))") == []


def test_tables_sort_by_keyboard(browser: Browser, pages: dict[str, Path]) -> None:
    browser.open(pages["many"])
    column = "[...document.querySelectorAll('#classes tbody tr')].map((row) => row.cells[4].dataset.value)"
    heading = browser.driver.find_elements("css selector", "#classes thead button")[4]
    orders = []
    for _ in range(2):
        heading.send_keys(Keys.ENTER)
        orders.append([float(value) for value in browser.run(f"return {column}")])
    assert orders[0] == sorted(orders[0], reverse=True)
    assert orders[1] == sorted(orders[0])
    assert browser.run("return document.querySelectorAll('#classes th[aria-sort=ascending]').length") == 1
    assert browser.errors() == []
