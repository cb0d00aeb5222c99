"""The documentation site: it builds without a warning, loads nothing from other hosts, and has every option."""

import html
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.browser import WIDTHS, chromium
from tests.docs.pages import REPOSITORY
from trainer.config.help import describe_sections
from trainer.config.options import OPTIONS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}  # the theme's remark on its successor
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder


def text_of(page: Path) -> str:
    """Return the text of a page, in one line."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text(encoding="utf-8"))).split())


def test_the_configuration_page_has_every_option_with_its_type_default_and_description(site: Path) -> None:
    page = (site / "configuration.html").read_text(encoding="utf-8")
    text = text_of(site / "configuration.html")
    options = [option for section in describe_sections() for option in section.options]
    assert {option.name for option in options} == OPTIONS
    for option in options:
        assert f'id="{option.name}"' in page
        entry = text.partition(f"{option.name}¶ ")[2]
        described = f"{option.description} Type: {option.type} Default: {option.default}"
        described = " ".join(described.split())
        assert entry.startswith(described), option.name
        assert entry.removeprefix(described).startswith(" See: "), f"{option.name}: no page explains it"
    assert 'See: <a href="data.html#csv-files">' in page


def test_the_python_page_has_the_public_functions(site: Path) -> None:
    page = (site / "python.html").read_text(encoding="utf-8")
    for anchor in ("regraft.load", "regraft.train", "trainer.inference.image_classifier.ImageClassifier.predict"):
        assert f'id="{anchor}"' in page
    text = text_of(site / "python.html")
    assert "number of classes in each prediction; with fewer classes, all of them" in text
    assert ":::" not in text


def test_paths_in_code_break_after_a_slash_and_tags_stay_whole(site: Path) -> None:
    page = (site / "failures.html").read_text(encoding="utf-8")
    assert "<code>tests/<wbr>distributed/<wbr>test_kills.py</code>" in page
    assert page.count("<code") == page.count("</code>")


def test_the_site_loads_nothing_from_other_hosts(site: Path) -> None:
    loading = re.compile(r'<(?:script|img|link|iframe)\b[^>]*?(?:src|href)="(https?:[^"]+)"')
    for page in site.glob("*.html"):
        assert loading.findall(page.read_text(encoding="utf-8")) == [], page.name


def test_the_page_for_unknown_addresses_leads_on(site: Path) -> None:
    page = (site / "404.html").read_text(encoding="utf-8")
    assert 'href="/configuration.html">the list of all options' in page


def test_options_in_code_do_not_break_at_a_hyphen(site: Path) -> None:
    page = (site / "failures.html").read_text(encoding="utf-8")
    assert '<code><span class="option">--max-restarts</span></code>' in page


def test_the_search_finds_options_and_pages(site: Path) -> None:
    index = json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))
    locations = {entry["location"] for entry in index["docs"]}
    assert {"configuration.html#data.cache_images", "contributing.html", "benchmark-results.html"} <= locations


def test_pages_with_wide_tables_and_code_fit_the_window(site: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as browser:
        for page in ("comparison", "configuration", "failures", "python"):
            for width in WIDTHS:
                browser.open(site / f"{page}.html", width=width)
                assert browser.overflow() == [], f"{page} at {width}"
