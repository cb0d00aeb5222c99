from pathlib import Path

import pytest

from trainer.files import write_atomically, write_text_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "x", "one")
    write_text_atomically(tmp_path / "x", "zwei 图片\n")
    assert (tmp_path / "x").read_text(encoding="utf-8") == "zwei 图片\n"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_a_failed_write_leaves_what_was_there(tmp_path: Path) -> None:
    write_text_atomically(tmp_path / "x", "one")

    def fail(temporary: Path) -> None:
        temporary.write_text("tw")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", fail)
    assert (tmp_path / "x").read_text() == "one"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
