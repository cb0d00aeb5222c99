"""SIGKILL at every call that writes a checkpoint: no complete checkpoint is lost, no partial one is loaded."""

import json
import sys
from collections import Counter
from pathlib import Path

import pytest

from tests.launching import REPOSITORY, run


@pytest.mark.slow
def test_sigkill_while_writing_leaves_complete_checkpoints(tmp_path: Path) -> None:
    run([sys.executable, "-m", "tests.distributed.die_while_writing", tmp_path], cwd=REPOSITORY, timeout=400)
    result = json.loads((tmp_path / "result.json").read_text())
    calls = Counter(call.partition(" ")[0] for call in result["calls"])
    assert len(result["calls"]) > 30
    assert len(result["epochs"]) == len(result["calls"]) + 1, "before each call, and after the last"
    assert calls.keys() == {"mkdir", "open", "write", "fsync", "rename", "replace", "unlink", "rmdir"}
    assert calls["write"] > calls["open"], "it dies within files too"
    assert set(result["epochs"]) == {2, 3}
    assert result["epochs"] == sorted(result["epochs"])
