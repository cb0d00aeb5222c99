import dataclasses
import io
import re
from pathlib import Path
from typing import Any

from rich.console import Console

from trainer.report.summary import TrainResult, best_row, comparison, reported_row, summary


def result(rows: list[dict[str, Any]], *, val_split: str | None = None) -> TrainResult:
    return TrainResult(folder=Path("runs/x"), rows=rows, val_split=val_split, examples=(40, 20), seconds=75.0)


def row(epoch: int, test: float, *, test_loss: float = 1.0, val: float | None = None) -> dict[str, Any]:
    columns = {
        "epoch": epoch, "train_loss": 0.25, "train_seen": 40, "test_accuracy": test, "test_loss": test_loss,
        "test_correct": round(test * 20), "test_seen": 20, "test_interval": [test - 0.1, test + 0.1], "seconds": 10.0,
    }  # fmt: skip
    return columns if val is None else columns | {"val_accuracy": val, "val_loss": 1.0, "val_seen": 10}


def test_without_selection_split_the_last_epoch_is_reported() -> None:
    rows = [row(1, 0.6), row(2, 0.9), row(3, 0.8)]
    assert reported_row(rows, None) is rows[2]
    assert best_row(rows, None) is rows[1]
    text = summary(result(rows))
    reported = "test accuracy 0.800 (95 % interval 0.700 to 0.900; 16 of 20 correct) after epoch 3, the last epoch"
    assert text.startswith(reported)
    for part in ("best 0.900 after epoch 2: selected on the test", "40 of 40 trained on, 20 of 20 evaluated", "runs/x"):
        assert part in text


def test_the_report_is_named_if_it_was_written(tmp_path: Path) -> None:
    run = dataclasses.replace(result([row(1, 0.6)]), folder=tmp_path)
    assert "report.html" not in summary(run)
    (tmp_path / "report.html").touch()
    assert "report.html" in summary(run)
    assert max(len(line) for line in summary(run).splitlines() if line.startswith("  ")) <= 80


def test_with_selection_split_its_best_epoch_is_reported() -> None:
    rows = [row(1, 0.9, val=0.5), row(2, 0.6, val=0.8), row(3, 0.95, val=0.7)]
    assert reported_row(rows, "val") is rows[1]
    text = summary(result(rows, val_split="val"))
    assert re.match(r"test accuracy 0\.600 .* after epoch 2, the best of 3 epochs on val \(0\.800\)", text)
    assert "selected on the test images" not in text
    interpolated = "the best epoch (2), interpolated with the initial weights at alpha 0.4 (wise.json); regraft.load"
    assert "the best epoch (2); regraft.load" in text
    assert interpolated in summary(result(rows, val_split="val"), alpha=0.4)


def test_another_metric_selects_and_is_named() -> None:
    rows = [row(epoch, 0.5, val=0.9) | {"val_f1_macro": f1} for epoch, f1 in enumerate([0.4, 0.6, 0.5], start=1)]
    assert best_row(rows, "val", "f1_macro") is rows[1]
    text = summary(dataclasses.replace(result(rows, val_split="val"), select_by="f1_macro"))
    assert "after epoch 2, the best of 3 epochs on val by f1_macro (0.600)" in text
    text = summary(dataclasses.replace(result(rows, val_split="val"), select_by="log_loss"))
    assert "after epoch 1, the best of 3 epochs on val by log_loss (1.000)" in text


def test_ties_in_accuracy_go_to_the_lower_loss_then_to_the_first() -> None:
    rows = [row(1, 0.9, test_loss=0.5), row(2, 0.9, test_loss=0.4), row(3, 0.9, test_loss=0.4)]
    assert best_row(rows, None) is rows[1]


def test_comparison_fits_80_columns() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(comparison(result([row(1, 0.9)]), result([row(1, 0.6)])))
    lines = [line for line in console.export_text().splitlines() if "0." in line]
    assert len(lines) == 2
    assert lines[0].split()[:5] == ["fine-tuned", "0.900", "0.800", "to", "1.000"]
    assert lines[1].split()[:3] == ["from", "scratch", "0.600"]
