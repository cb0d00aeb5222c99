import json
from pathlib import Path

import pytest

from regraft.contract import ERROR_FILE
from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError


@pytest.mark.parametrize(
    ("error", "message", "has_stack"),
    [(UserError("x is 3: expected 4"), "error: x is 3: expected 4", False), (ValueError("no"), "ValueError: no", True)],
)
def test_the_first_error_is_written_in_torchruns_format(
    error: Exception, message: str, has_stack: bool, tmp_path: Path
) -> None:
    path = tmp_path / "error.json"
    environment = {ERROR_FILE: str(path), "RANK": "5"}
    write_error_file(error, environment)
    write_error_file(ValueError("a consequence"), environment)
    content = json.loads(path.read_text())["message"]
    assert content["message"] == message
    extra = content["extraInfo"]
    assert (extra["rank"], bool(extra["py_callstack"])) == ("5", has_stack)
    assert int(extra["timestamp"]) == int(extra["time"])


def test_without_a_launcher_or_a_disk_nothing_is_written(tmp_path: Path) -> None:
    write_error_file(ValueError(), {})
    write_error_file(ValueError(), {ERROR_FILE: str(tmp_path / "nowhere" / "error.json")})
    assert list(tmp_path.iterdir()) == []
