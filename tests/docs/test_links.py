"""Links between the documents, README included: files and headings exist, and the site has every page."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlparse

import pytest
import yaml
from markdown.extensions.toc import slugify

from tests.docs.pages import DOCUMENTS, REPOSITORY, name, prose

LINKING = [*DOCUMENTS, REPOSITORY / "benchmarks/RESULTS.md"]
LINK = re.compile(r"!?\[([^\]]*)\]\(([^)\s]+)\)")


def anchors(document: Path) -> set[str]:
    """Return the anchors of the headings, as MkDocs makes them."""
    headings = re.findall(r"^#+ (.+?)\s*$", prose(document), flags=re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("document", LINKING, ids=name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    for text, target in LINK.findall(prose(document)):
        assert text.strip(), f"{target}: a link or an image without a text"
        url = urlparse(target)
        if url.scheme:
            assert url.scheme == "https", target
            assert url.netloc, target
            continue
        path = (document.parent / url.path).resolve() if url.path else document
        assert path.is_relative_to(REPOSITORY), target
        assert path.is_file() or path.is_dir(), target
        # The options are headings of the built page: the strict build checks links to them.
        if url.fragment and path.name != "configuration.md":
            assert url.fragment in anchors(path), target


def test_readme_links_to_the_start_of_the_site() -> None:
    targets = {target.partition("#")[0] for _, target in LINK.findall(prose(REPOSITORY / "README.md"))}
    assert {"docs/index.md", "docs/first-run.md", "docs/your-data.md", "docs/comparison.md"} <= targets


def test_pages_have_one_title_and_no_skipped_level() -> None:
    for document in (REPOSITORY / "docs").glob("*.md"):
        levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(document), flags=re.MULTILINE)]
        assert levels[0] == 1, name(document)
        assert levels.count(1) == 1, name(document)
        assert all(after <= before + 1 for before, after in pairwise(levels)), name(document)


def test_lists_and_tables_are_those_of_python_markdown() -> None:
    """GitHub starts a list or a table in a paragraph; the site needs an empty line before it."""
    for document in DOCUMENTS:
        lines = prose(document).splitlines()
        for number, (before, line) in enumerate(pairwise(lines), start=2):
            where = f"{name(document)}:{number}"
            in_paragraph = before.strip() and not re.match(r"[-*|#]|\d+\.| {2,}|<", before)
            assert not (in_paragraph and re.match(r"([-*]|\d+\.) |\|", line)), where
            assert not re.match(r" {1,3}([-*]|\d+\.) ", line), f"{where}: a nested list needs 4 spaces"


def test_the_navigation_has_every_page_once() -> None:
    settings = yaml.safe_load((REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8"))
    pages = list(navigation(settings["nav"]))
    assert len(pages) == len(set(pages))
    assert {path.name for path in (REPOSITORY / "docs").glob("*.md")} <= set(pages)


def navigation(entries: list[dict[str, object]]) -> Iterator[str]:
    """Yield the pages of the navigation."""
    for entry in entries:
        for target in entry.values():
            if isinstance(target, list):
                yield from navigation(target)
            else:
                yield str(target)
