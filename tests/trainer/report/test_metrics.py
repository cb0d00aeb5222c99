import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.metrics import Progress
from trainer.report.metrics import MetricsFile, Row, epoch_row, epoch_rows, parse_rows, start_row, train_row


def test_epoch_row_has_the_documented_keys(progress: Progress, evaluation: Evaluation) -> None:
    row = epoch_row(progress, {"test": evaluation}, memory=1000)
    expected = {
        "epoch": 2, "step": 7, "train_loss": 1.5, "train_accuracy": 0.75, "test_accuracy": 0.6, "test_seen": 5,
        "examples_per_sec": 2.0, "examples_per_sec_compute": 4.0,
    }  # fmt: skip
    assert row.items() >= expected.items()
    assert row["kind"] == "epoch"
    assert row["lr_head"] == 1.0
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_train_row_has_its_kind_and_a_fractional_epoch(progress: Progress) -> None:
    row = train_row(progress, steps_per_epoch=4)
    assert (row["kind"], row["epoch"], row["step"], row["train_seen"]) == ("train", 1.75, 7, 4)


def test_start_row_is_at_epoch_0_and_is_not_an_epoch_row(evaluation: Evaluation) -> None:
    row = start_row({"test": evaluation, "val": evaluation}, 4.5)
    expected = {
        "kind": "start", "epoch": 0, "step": 0, "seconds": 4.5, "test_accuracy": 0.6, "val_accuracy": 0.6,
    }  # fmt: skip
    assert row.items() >= expected.items()
    low, high = row["test_interval"]
    assert low == pytest.approx(0.2307, abs=1e-3)
    assert high == pytest.approx(0.8824, abs=1e-3)
    assert parse_rows(json.dumps(row, allow_nan=False), "m") == [row]
    assert epoch_rows([row]) == []


ROWS: list[Row] = [
    {"kind": "train", "epoch": 0.5},
    {"kind": "epoch", "epoch": 1, "note": "图"},
    {"kind": "train", "epoch": 1.5},
    {"kind": "epoch", "epoch": 2},
    {"kind": "train", "epoch": 2.5},
]


def write_rows(path: Path, rows: list[Row]) -> MetricsFile:
    file = MetricsFile(path)
    for row in rows:
        file.append(row)
    return file


def read_rows(path: Path) -> list[Row]:
    return parse_rows(path.read_text(encoding="utf-8"), str(path))


def test_text_equals_the_file_before_it_is_closed(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m", ROWS)
    assert file.text == (tmp_path / "m").read_text(encoding="utf-8")
    assert parse_rows(file.text, "m") == file.rows == ROWS
    file.close()


def test_resumed_file_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m", ROWS[:3])
    checkpoint = file.text  # in mid-epoch 2
    for row in ROWS[3:]:
        file.append(row)
    file.close()
    resumed = MetricsFile(tmp_path / "m", checkpoint)
    assert read_rows(tmp_path / "m") == resumed.rows == ROWS[:3]
    resumed.append({"kind": "epoch", "epoch": 2, "again": True})
    resumed.close()
    assert read_rows(tmp_path / "m") == [*ROWS[:3], {"kind": "epoch", "epoch": 2, "again": True}]
    assert [row["epoch"] for row in epoch_rows(resumed.rows)] == [1, 2]
    MetricsFile(tmp_path / "m").close()
    assert read_rows(tmp_path / "m") == [], "a new run has no rows"


@pytest.mark.parametrize("content", [None, b"", b'{"kind": "epo', b"\xff\xfe\n"])
def test_missing_or_damaged_file_is_restored(content: bytes | None, tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m", ROWS)
    file.close()
    if content is None:
        (tmp_path / "m").unlink()
    else:
        (tmp_path / "m").write_bytes(content)
    MetricsFile(tmp_path / "m", file.text).close()
    assert read_rows(tmp_path / "m") == ROWS
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_superseded_process_does_not_write_into_the_new_file(tmp_path: Path) -> None:
    earlier = write_rows(tmp_path / "m", ROWS[:2])
    later = MetricsFile(tmp_path / "m", earlier.text)
    earlier.append({"kind": "epoch", "epoch": 7})
    later.append(ROWS[2])
    earlier.append({"kind": "epoch", "epoch": 8})
    assert read_rows(tmp_path / "m") == ROWS[:3]
    earlier.close()
    later.close()


@pytest.mark.parametrize(
    "line",
    ['{"kind": "epo', "[]", "3", '{"epoch": 1}', '{"kind": "epoch"}', '{"kind": "epoch", "epoch": "1"}', "[" * 10**5],
    ids=["truncated", "list", "number", "no kind", "no epoch", "string for a number", "deep"],
)
@pytest.mark.parametrize("end", ["", "\n", '\n{"kind": "epoch", "epoch": 2}\n'])
def test_invalid_line_is_reported_with_file_and_line_number(line: str, end: str) -> None:
    with pytest.raises(UserError) as caught:
        parse_rows('{"kind": "epoch", "epoch": 1}\n' + line + end, "there/metrics.jsonl")
    assert str(caught.value).startswith("there/metrics.jsonl, line 2: not a metrics row")
    assert "start a new run with --run.resume never" in str(caught.value)


def test_nan_is_never_written(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m", ROWS[:1])
    with pytest.raises(ValueError, match="JSON compliant"):
        file.append({"kind": "epoch", "epoch": 1, "train_loss": float("nan")})
    assert file.text == (tmp_path / "m").read_text(encoding="utf-8")
    assert file.rows == ROWS[:1]
    file.close()
