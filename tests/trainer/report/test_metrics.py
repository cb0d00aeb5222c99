import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.evaluate import Evaluation, SelectBy
from trainer.metrics import Progress
from trainer.report.metrics import (
    MetricsFile,
    Row,
    class_rows,
    epoch_row,
    epoch_rows,
    parse_rows,
    row_score,
    start_row,
    train_row,
)


def test_rows_have_the_documented_keys(progress: Progress, evaluation: Evaluation) -> None:
    epoch = epoch_row(progress, {"test": evaluation}, evaluation_seconds=1.5, memory=1000)
    start = start_row({"test": evaluation, "val": evaluation}, 4.5)
    train = train_row(progress, steps_per_epoch=4, memory=1000)
    assert epoch.items() >= {
        "kind": "epoch", "epoch": 2, "step": 7, "train_loss": 1.5, "train_accuracy": 0.75, "test_accuracy": 0.6,
        "test_seen": 5, "examples_per_sec": 2.0, "examples_per_sec_compute": 4.0, "lr_head": 1.0,
    }.items()  # fmt: skip
    assert start.items() >= {
        "kind": "start", "epoch": 0, "step": 0, "seconds": 4.5, "test_accuracy": 0.6, "val_accuracy": 0.6,
    }.items()  # fmt: skip
    assert start["test_interval"] == pytest.approx([0.2307, 0.8824], abs=1e-3)
    assert train.items() >= {
        "kind": "train", "epoch": 1.75, "step": 7, "train_seen": 4, "examples_per_sec_compute": 4.0, "seconds": 2.0,
        "memory_bytes": 1000,
    }.items()  # fmt: skip
    of_classes = class_rows(progress, {"test": evaluation}, ("a", "b \udcff"))
    assert of_classes == [
        {
            "kind": "classes", "epoch": 2, "step": 7, "split": "test", "classes": ["a", "b \udcff"],
            "support": [3, 2], "predicted": [4, 1], "correct": [2, 1], "precision": [0.5, 1.0],
            "recall": [2 / 3, 0.5], "f1": [4 / 7, 2 / 3],
        }
    ]  # fmt: skip
    rows = [start, train, epoch, *of_classes]
    text = "\n".join(json.dumps(row, allow_nan=False) for row in rows)
    assert parse_rows(text, "m") == rows
    assert epoch_rows(rows) == [epoch]


@pytest.mark.parametrize("metric", ["accuracy", "balanced_accuracy", "f1_macro", "log_loss"])
def test_a_row_has_the_score_of_its_evaluation(metric: SelectBy, progress: Progress, evaluation: Evaluation) -> None:
    row = epoch_row(progress, {"val": evaluation}, evaluation_seconds=1.5, memory=1)
    assert row_score(row, "val", metric) == evaluation.score(metric)


TRAIN: list[Row] = [{"kind": "train", "epoch": epoch} for epoch in (0.5, 1.5, 2.5)]
ROWS = [TRAIN[0], {"kind": "epoch", "epoch": 1, "note": "图 \udcff"}, TRAIN[1], {"kind": "epoch", "epoch": 2}, TRAIN[2]]


def write_rows(path: Path, rows: list[Row]) -> MetricsFile:
    file = MetricsFile(path)
    for row in rows:
        file.append(row)
    return file


def read_rows(path: Path) -> list[Row]:
    return parse_rows(path.read_text(encoding="utf-8"), str(path))


def test_resumed_file_drops_rows_after_the_checkpoint(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "m", ROWS[:3])
    checkpoint = file.text  # in mid-epoch 2
    assert checkpoint == (tmp_path / "m").read_text(encoding="utf-8"), "before it is closed"
    for row in ROWS[3:]:
        file.append(row)
    file.close()
    (tmp_path / "m").write_bytes(b"\xff\xfe damaged")
    resumed = MetricsFile(tmp_path / "m", checkpoint)
    assert read_rows(tmp_path / "m") == resumed.rows == ROWS[:3]
    resumed.append({"kind": "epoch", "epoch": 2, "again": True})
    resumed.close()
    assert read_rows(tmp_path / "m") == [*ROWS[:3], {"kind": "epoch", "epoch": 2, "again": True}]
    assert [row["epoch"] for row in epoch_rows(resumed.rows)] == [1, 2]
    MetricsFile(tmp_path / "m").close()
    assert read_rows(tmp_path / "m") == [], "a new run has no rows"
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
