import json
from pathlib import Path

import pytest

from benchmarks.fingerprints import compare


@pytest.mark.parametrize(("changed", "code"), [({}, 0), ({"weights/model": "def"}, 1)])
def test_compare_finds_changed_tensors(tmp_path: Path, changed: dict[str, str], code: int) -> None:
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    for file, extra in zip(files, ({}, changed), strict=True):
        file.write_text(json.dumps({"d2l": {"metrics": [{"loss": 1.0}], "weights/model": "abc", **extra}}))
    assert compare(*files) == code
