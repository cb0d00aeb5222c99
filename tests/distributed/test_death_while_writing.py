"""SIGKILL at every stage of the writing of a checkpoint: nothing whole is lost, nothing half is taken for whole."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.launching import REPOSITORY, run


@pytest.mark.slow
def test_who_dies_while_it_writes_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    run([sys.executable, "-m", "tests.distributed.die_while_writing", tmp_path], cwd=REPOSITORY, timeout=120)
    result = json.loads((tmp_path / "result.json").read_text())
    calls = Counter(call.partition(" ")[0] for call in result["calls"])
    deaths = len(result["found"])
    print(f"{len(result['calls'])} calls ({dict(calls)}), {deaths} deaths, {result['seconds']:.1f} s")
    assert len(result["calls"]) > 30
    assert deaths == 2 * len(result["calls"]), "before and after each"
    assert calls.keys() == {"mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"}
    assert calls["write"] > calls["open"], "within files too"
    assert set(result["found"]) == {2, 3}
    assert result["found"] == sorted(result["found"]), (
        "until it is in its place the earlier, from then on the new one"
    )
