import errno
import io
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.loop import Progress
from trainer.metrics import Metrics
from trainer.report import figures
from trainer.report.console import ProgressBar
from trainer.report.logger import RunLogger
from trainer.report.metrics import parse_rows
from trainer.run.folder import CURVES, METRICS

FIGURES = Metrics(
    loss_sum=6.0, correct=3, seen=4, seconds=2.0, compute_seconds=1.0, first_nonfinite_step=None
)
TEST = Evaluation(loss_sum=5.0, correct=(2, 1), support=(3, 2), predicted=(4, 1))


def report(folder: Path, text: str = "") -> RunLogger:
    console = Console(file=io.StringIO(), width=100, soft_wrap=True)
    progress_bar = ProgressBar(console, epochs=2, steps_per_epoch=2, done_steps=0)
    return RunLogger(
        progress_bar, folder=folder, title="x", device=torch.device("cpu"), text=text, check=lambda: None
    )


def at(epoch_step: int) -> Progress:
    return Progress(
        epoch=1, epoch_step=epoch_step, step=epoch_step, figures=FIGURES, lr={"backbone": 0.1, "head": 1.0}
    )


def full(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_what_is_told_is_shown_written_and_drawn(tmp_path: Path) -> None:
    told = report(tmp_path)
    told.start({"test": TEST}, 2.5)
    told.step(1, 1)
    told.point(at(1))
    told.epoch(at(2), {"test": TEST})
    told.close()
    assert [row["kind"] for row in told.rows] == ["start", "train", "epoch"]
    assert parse_rows((tmp_path / METRICS).read_text(), "m") == told.rows == parse_rows(told.text, "m")
    assert (tmp_path / CURVES).stat().st_size > 0
    assert told.failure is None
    again = report(tmp_path, told.text)
    assert again.rows == told.rows
    again.close()


@pytest.mark.parametrize("at_fault", ["append", "draw_curves"])
def test_a_full_disk_is_kept_for_all_to_hear_and_raised_by_nobody_alone(
    at_fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = report(tmp_path)
    if at_fault == "append":
        monkeypatch.setattr(told._metrics, "append", full)
    else:
        monkeypatch.setattr(figures, "draw_curves", full)
    told.epoch(at(2), {"test": TEST})
    told.close()
    assert str(told.failure) == (
        f"{tmp_path}: the figures could not be written (No space left on device). What was saved before is whole: "
        "make room, and the same command goes on from there"
    )


def test_a_full_disk_before_training_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.report.metrics.write_text_atomically", full)
    with pytest.raises(UserError, match=r"figures could not be written .*No space left.*make room"):
        report(tmp_path)
