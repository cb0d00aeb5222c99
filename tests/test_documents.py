"""What the documents point at exists."""

import re

import pytest

from tests.launching import REPOSITORY

DOCUMENTS = sorted([*REPOSITORY.glob("*.md"), *REPOSITORY.glob("docs/*.md")])


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_and_every_path_leads_somewhere(document) -> None:  # type: ignore[no-untyped-def]
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert (document.parent / target).exists(), target
    for path in re.findall(r"`((?:tests|configs|benchmarks|docs)/[\w./-]+\.\w+)`", text):
        assert (REPOSITORY / path).exists(), path
    assert not re.search(r"\b(TODO|TUNE|SOAK|CITIME|TESTTIME|HYMEN|QUICKSTART)\b", text), (
        "a gap that was left"
    )
