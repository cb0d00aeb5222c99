"""Partial outputs, from which the same command goes on."""

import csv
from pathlib import Path

import pytest

from tests.disks import disk
from trainer.errors import UserError
from trainer.inference.answers import Prediction
from trainer.inference.journal import Journal
from trainer.inference.rows import CsvColumns, Row

IDENTITY = {"model": "abc", "topk": 1, "threshold": None}
ROWS = [Row(f"{number}.jpg", Prediction(("a",), (0.5,))) for number in range(4)]
PATHS = [row.path for row in ROWS]
COLUMNS = CsvColumns(0)


def read_paths(output: Path) -> list[str]:
    with output.open(encoding="utf-8", newline="") as stream:
        return [row["path"] for row in csv.DictReader(stream)]


def test_a_partial_output_goes_on_and_a_complete_one_is_not_overwritten(tmp_path: Path) -> None:
    output = tmp_path / "x.csv"
    journal = Journal.open(output, IDENTITY)
    journal.append(ROWS[2:])
    journal.write_output(PATHS, COLUMNS, is_complete=False)
    journal.close()
    assert read_paths(output) == PATHS[2:]
    again = Journal.open(output, IDENTITY)
    assert again.rows == {row.path: row for row in ROWS[2:]}
    again.append(ROWS[:2])
    again.write_output(PATHS, COLUMNS, is_complete=True)
    again.close()
    assert read_paths(output) == PATHS
    assert [path.name for path in tmp_path.iterdir()] == ["x.csv"]
    content = output.read_bytes()
    with pytest.raises(UserError, match=r"x.csv: exists, and is not overwritten; remove it or choose another name"):
        Journal.open(output, IDENTITY)
    assert output.read_bytes() == content


def test_images_that_could_not_be_read_are_tried_again(tmp_path: Path) -> None:
    output = tmp_path / "x.csv"
    journal = Journal.open(output, IDENTITY)
    journal.append([ROWS[0], Row(PATHS[1], None, "no such file")])
    assert list(journal.rows) == PATHS[:2]
    journal.write_output(PATHS, COLUMNS, is_complete=False)
    journal.close()
    again = Journal.open(output, IDENTITY)
    assert list(again.rows) == PATHS[:1]
    again.append(ROWS[1:2])
    again.close()
    assert Journal.open(output, IDENTITY).rows == {row.path: row for row in ROWS[:2]}


@pytest.mark.parametrize("cut", [1, 30, 60])
def test_a_line_that_was_cut_off_by_a_kill_is_dropped(cut: int, tmp_path: Path) -> None:
    output = tmp_path / "x.csv"
    journal = Journal.open(output, IDENTITY)
    journal.append(ROWS[:2])
    journal.close()
    partial = tmp_path / "x.csv.partial"
    partial.write_bytes(partial.read_bytes()[:-cut])
    again = Journal.open(output, IDENTITY)
    assert list(again.rows) == PATHS[:1]
    again.append(ROWS[1:])
    again.close()
    assert list(Journal.open(output, IDENTITY).rows) == PATHS


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": 1, "model": "other", "topk": 1, "threshold": null}\n', "was begun with another model; remove it"),
        (b'{"format": 1, "model": "abc", "topk": 2}\n', "was begun with another topk"),
        (b'{"format": 2}\n', "not a partial output of this version"),
        (b"[]\n", "not a partial output"),
        (b"notes\n", "not a partial output"),
        (b"notes without a line end", "not a partial output"),
        (b'{"format": 1, "model": "abc", "topk": 1, "threshold": null}\n{}\n', "not a partial output"),
        (b'{"format": 1, "model": "abc", "topk": 1, "threshold": null}\n' + b"[" * 100_000 + b"\n", "not a partial"),
    ],
)
def test_another_partial_output_is_an_error_and_stays_as_it_is(content: bytes, message: str, tmp_path: Path) -> None:
    partial = tmp_path / "x.csv.partial"
    partial.write_bytes(content)
    with pytest.raises(UserError, match=message):
        Journal.open(tmp_path / "x.csv", IDENTITY)
    assert partial.read_bytes() == content


def test_two_commands_do_not_write_one_output(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "x.csv", IDENTITY)
    with pytest.raises(UserError, match="another command is writing it"):
        Journal.open(tmp_path / "x.csv", IDENTITY)
    journal.close()
    Journal.open(tmp_path / "x.csv", IDENTITY).close()


@pytest.mark.parametrize("opens", ["before", "after"])
def test_an_output_that_another_command_finishes_just_now_is_not_overwritten(
    opens: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other command removes its journal before or after this one opens it."""
    output, journal = tmp_path / "x.csv", tmp_path / "x.csv.partial"
    journal.write_bytes(b"" if opens == "after" else b"{}\n")

    def finish(*_: object) -> None:
        output.write_text("of the other command")
        if opens == "before":
            journal.unlink()

    monkeypatch.setattr("fcntl.flock", finish)
    with pytest.raises(UserError, match=r"x.csv: exists, and is not overwritten"):
        Journal.open(output, IDENTITY)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["of the other command"]


def test_an_output_that_cannot_be_created_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "folder.csv").mkdir()
    for name, message in (("folder.csv", "this is a folder"), ("none/x.csv", "No such file or directory")):
        with pytest.raises(UserError, match=f"^--output .*{name}: .*{message}"):
            Journal.open(tmp_path / name, IDENTITY)


def test_a_full_disk_loses_no_row(tmp_path: Path) -> None:
    with disk(tmp_path / "disk", "64k") as root:
        filler, rows = root / "filler", [Row(f"{number}.jpg", Prediction(("a",), (0.5,))) for number in range(1000)]
        filler.write_bytes(b"\0" * 40_000)
        journal = Journal.open(root / "x.csv", IDENTITY)

        def append_all() -> None:
            for row in rows:
                journal.append([row])

        with pytest.raises(UserError, match=r"x.csv.partial: cannot be written \(No space left on device\)"):
            append_all()
        saved = list(journal.rows)
        journal.close()
        with pytest.raises(UserError, match=r"y.csv.partial: cannot be written"):
            Journal.open(root / "y.csv", IDENTITY)
        again = Journal.open(root / "x.csv", IDENTITY)
        assert list(again.rows) == saved == [row.path for row in rows[: len(saved)]]
        with pytest.raises(UserError, match=r"x.csv: cannot be written .*the same command writes the output from them"):
            again.write_output([], COLUMNS, is_complete=True)
        filler.unlink()
        again.write_output([], COLUMNS, is_complete=True)
        again.close()
        assert read_paths(root / "x.csv") == saved
        assert [path.name for path in root.iterdir()] == ["x.csv"]
