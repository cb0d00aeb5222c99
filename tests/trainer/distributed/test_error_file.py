import json
from pathlib import Path

import pytest

from regraft.contract import ERROR_FILE
from trainer.distributed.error_file import write_error_file
from trainer.errors import UserError


@pytest.mark.parametrize("error", [UserError("x is 3: expected 4"), ValueError("no")])
def test_the_first_error_is_written_in_torchruns_format(error: Exception, tmp_path: Path) -> None:
    environment = {ERROR_FILE: str(tmp_path / "error.json"), "RANK": "5"}
    write_error_file(error, environment)
    write_error_file(ValueError("a consequence"), environment)
    content = json.loads((tmp_path / "error.json").read_text())["message"]
    is_user_error = isinstance(error, UserError)
    assert content["message"] == f"{'error' if is_user_error else 'ValueError'}: {error}"
    extra = content["extraInfo"]
    assert (extra["rank"], bool(extra["py_callstack"])) == ("5", not is_user_error)
    assert int(extra["timestamp"]) == int(extra["time"])


def test_without_a_launcher_or_a_disk_nothing_is_written(tmp_path: Path) -> None:
    write_error_file(ValueError(), {})
    write_error_file(ValueError(), {ERROR_FILE: str(tmp_path / "nowhere" / "error.json")})
    assert list(tmp_path.iterdir()) == []
