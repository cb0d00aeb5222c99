import errno
import io
import os
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from regraft.contract import CURVES, METRICS, REPORT
from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.metrics import Progress
from trainer.report import figures
from trainer.report.console import ProgressBar
from trainer.report.logger import RunLogger
from trainer.report.metrics import parse_rows
from trainer.report.trackers import Trackers


def make_logger(folder: Path, text: str = "") -> RunLogger:
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    progress_bar = ProgressBar(console, epochs=2, steps_per_epoch=4, done_steps=0)
    return RunLogger(
        progress_bar, folder=folder, title="x", classes=("a", "b"), device=torch.device("cpu"), text=text,
        trackers=Trackers((), "", Mock(folder=folder)), check=lambda: None, writes_report=True,
    )  # fmt: skip


def full_disk(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_logged_rows_are_written_and_drawn(tmp_path: Path, progress: Progress, evaluation: Evaluation) -> None:
    logger = make_logger(tmp_path)
    logger.log_start({"test": evaluation}, 2.5)
    logger.log_progress(1, 1)
    logger.log_step(progress)
    logger.log_epoch(progress, {"test": evaluation}, 1.5)
    logger.close()
    assert [row["kind"] for row in logger.rows] == ["start", "train", "epoch", "classes"]
    assert parse_rows((tmp_path / METRICS).read_text(), "m") == logger.rows == parse_rows(logger.text, "m")
    assert (tmp_path / CURVES).stat().st_size > 0
    assert "The classes that are found least often, so far" in (tmp_path / REPORT).read_text(encoding="utf-8")
    assert logger.failure is None
    resumed = make_logger(tmp_path, logger.text)
    assert resumed.rows == logger.rows
    resumed.close()


def test_picture_that_fails_is_one_warning(
    tmp_path: Path, progress: Progress, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = make_logger(tmp_path)
    monkeypatch.setattr(figures, "write_figure", full_disk)
    logger.log_epoch(progress, {"test": evaluation}, 1.5)
    logger.draw_curves()
    logger.close()
    assert logger.failure is None
    assert logger._progress_bar.console.file.getvalue().count("warning: curves.png was not drawn") == 1


def test_full_disk_is_stored_as_a_failure(
    tmp_path: Path, progress: Progress, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = make_logger(tmp_path)
    monkeypatch.setattr(logger._metrics, "append", full_disk)
    logger.log_epoch(progress, {"test": evaluation}, 1.5)
    logger.close()
    assert str(logger.failure) == (
        f"{tmp_path}: the metrics could not be written (No space left on device). Earlier checkpoints are complete: "
        "free some disk space, and the same command resumes from the newest one"
    )


def test_full_disk_before_training_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.report.metrics.write_text_atomically", full_disk)
    with pytest.raises(UserError, match=r"metrics could not be written .*No space left"):
        make_logger(tmp_path)
