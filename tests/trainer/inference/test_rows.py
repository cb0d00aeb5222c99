"""Rows in CSV, JSON Lines and Parquet."""

import csv
import importlib.util
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from trainer.errors import UserError
from trainer.inference.answers import Prediction
from trainer.inference.rows import CsvColumns, Row, check_format, in_order, write_rows

ROWS = [
    Row('a, "b"\n.jpg', Prediction(("it, is\n'quoted'", "猫"), (0.75, 0.25))),
    Row("w\udcff.jpg", Prediction(("猫", "broken \udcff"), (0.6000001, 0.3999999), is_unknown=True)),
    Row("=1+1.jpg", None, "no such file"),
    Row("Icon\r", Prediction(("cat\rdog", "猫"), (0.5, 0.5))),
]


def test_csv_has_every_name_unchanged(tmp_path: Path) -> None:
    write_rows(tmp_path / "x.csv", ROWS, CsvColumns(2))
    with (tmp_path / "x.csv").open(encoding="utf-8", errors="surrogateescape", newline="") as stream:
        header, *rows = csv.reader(stream)
    assert header == ["path", "label", "score", "label_1", "score_1", "label_2", "score_2", "error"]
    assert rows == [
        [ROWS[0].path, "it, is\n'quoted'", "0.75", "it, is\n'quoted'", "0.75", "猫", "0.25", ""],
        [ROWS[1].path, "unknown", "0.6000001", "猫", "0.6000001", "broken \udcff", "0.3999999", ""],
        ["=1+1.jpg", "", "", "", "", "", "", "no such file"],
        ["Icon\r", "cat\rdog", "0.5", "cat\rdog", "0.5", "猫", "0.5", ""],
    ]
    write_rows(tmp_path / "y.csv", ROWS[:1], CsvColumns(0))
    assert (tmp_path / "y.csv").read_text().startswith("path,label,score,error\n")


def test_json_lines_and_parquet_have_the_same_fields(tmp_path: Path) -> None:
    for name in ("x.jsonl", "x.PARQUET"):
        write_rows(tmp_path / name, ROWS, CsvColumns(0))
    lines = [json.loads(line) for line in (tmp_path / "x.jsonl").read_text(encoding="ascii").splitlines()]
    assert [Row.from_fields(line) for line in lines] == ROWS
    assert lines[1] == {
        "path": "w\udcff.jpg", "label": "unknown", "score": 0.6000001,
        "labels": ["猫", "broken \udcff"], "scores": [0.6000001, 0.3999999],
    }  # fmt: skip
    table = pq.read_table(tmp_path / "x.PARQUET").to_pylist()
    assert [row["path"] for row in table] == [ROWS[0].path, r"w\xff.jpg", "=1+1.jpg", "Icon\r"]
    assert table[1]["labels"] == ["猫", r"broken \xff"]
    assert table[2] == {"path": "=1+1.jpg", "label": None, "score": None, "labels": None, "scores": None} | {
        "error": "no such file"
    }
    write_rows(tmp_path / "empty.parquet", [], CsvColumns(0))
    assert pq.read_table(tmp_path / "empty.parquet").num_rows == 0


def test_a_name_of_another_format_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("x.txt", "x", "x.csv.gz"):
        with pytest.raises(UserError, match=r"expected a name that ends in .csv, .jsonl or .parquet"):
            check_format(tmp_path / name)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'regraft\[parquet\]'"):
        check_format(tmp_path / "x.parquet")
    check_format(tmp_path / "x.csv")


def test_rows_are_ordered_by_path_and_others_come_last() -> None:
    assert list(in_order(reversed(ROWS[:3]), [ROWS[0].path, "missing", ROWS[1].path])) == ROWS[:3]
