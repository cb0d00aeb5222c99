import json
from pathlib import Path

import pytest

from trainer.errors import UserError
from trainer.evaluate import Evaluation
from trainer.loop import Progress
from trainer.meter import Figures
from trainer.report.metrics import MetricsFile, check_epochs, epoch_row, epoch_rows, read_rows, train_row

FIGURES = Figures(loss_sum=6.0, correct=3, seen=4, seconds=2.0, compute_seconds=1.0, bad_step=None)
PROGRESS = Progress(epoch=2, epoch_step=3, step=7, figures=FIGURES, lr={"backbone": 0.1, "head": 1.0})
TEST = Evaluation(loss_sum=5.0, correct=(2, 1), support=(3, 2), predicted=(4, 1))


def test_an_epochs_row_has_the_names_that_scripts_rely_on() -> None:
    row = epoch_row(PROGRESS, {"test": TEST}, memory=1000)
    promised = {
        "epoch": 2,
        "step": 7,
        "train_loss": 1.5,
        "train_accuracy": 0.75,
        "test_accuracy": 0.6,
        "test_seen": 5,
        "examples_per_sec": 2.0,
        "examples_per_sec_compute": 4.0,
    }
    assert row.items() >= promised.items()
    assert row["kind"] == "epoch"
    assert row["lr_head"] == 1.0
    assert json.loads(json.dumps(row, allow_nan=False)) == row


def test_a_finer_row_tells_its_kind_and_its_place_within_the_epoch() -> None:
    row = train_row(PROGRESS, steps_per_epoch=4)
    assert (row["kind"], row["epoch"], row["step"], row["train_seen"]) == ("train", 1.75, 7, 4)


def test_a_resumed_file_keeps_whole_epochs_and_drops_what_came_after(tmp_path: Path) -> None:
    rows = [
        {"kind": "train", "epoch": 0.5},
        {"kind": "epoch", "epoch": 1},
        {"kind": "train", "epoch": 1.5},
        {"kind": "epoch", "epoch": 2},
        {"kind": "train", "epoch": 2.5},
    ]
    file = MetricsFile(tmp_path / "m", keep_epochs=0)
    for row in rows:
        file.append(row)
    resumed = MetricsFile(tmp_path / "m", keep_epochs=2)
    assert read_rows(tmp_path / "m") == rows[:4]
    resumed.append({"kind": "epoch", "epoch": 3})
    assert [row["epoch"] for row in epoch_rows(read_rows(tmp_path / "m"))] == [1, 2, 3]
    MetricsFile(tmp_path / "m", keep_epochs=0)
    assert read_rows(tmp_path / "m") == []


def test_a_last_line_cut_off_by_a_kill_is_passed_over_and_another_is_not(tmp_path: Path) -> None:
    whole = '{"kind": "epoch", "epoch": 1}\n'
    (tmp_path / "m").write_text(whole + '{"kind": "epo')
    assert len(read_rows(tmp_path / "m")) == 1
    (tmp_path / "m").write_text('{"kind": "epo\n' + whole)
    with pytest.raises(UserError, match="line 1"):
        read_rows(tmp_path / "m")


def test_no_file_has_no_rows(tmp_path: Path) -> None:
    assert read_rows(tmp_path / "nowhere") == []


def with_epochs(path: Path, *epochs: int) -> Path:
    """Write rows of whole epochs, each after a point within it."""
    file = MetricsFile(path, keep_epochs=0)
    for epoch in epochs:
        file.append({"kind": "train", "epoch": epoch - 0.5})
        file.append({"kind": "train", "epoch": float(epoch)})
        file.append({"kind": "epoch", "epoch": epoch})
    return path


@pytest.mark.parametrize(("there", "state"), [((), 0), ((1,), 0), ((1, 2, 3), 3), ((1, 2, 3, 4), 3)])
def test_rows_fit_a_state_with_at_most_one_epoch_more(
    there: tuple[int, ...], state: int, tmp_path: Path
) -> None:
    check_epochs(with_epochs(tmp_path / "m.jsonl", *there), state)


@pytest.mark.parametrize(
    ("there", "state", "fault"),
    [
        ((), 2, "lacks epoch 1, 2, but the training state is that after epoch 2"),
        ((1, 3), 3, "lacks epoch 2, but the training state is that after epoch 3"),
        ((1, 2), 3, "lacks epoch 3, but"),
        ((1, 2), 0, "goes on to epoch 2, but there is no training state"),
        ((1, 2, 3), 1, "goes on to epoch 3, but the training state is that after epoch 1"),
    ],
)
def test_rows_of_another_state_are_refused(
    there: tuple[int, ...], state: int, fault: str, tmp_path: Path
) -> None:
    path = with_epochs(tmp_path / "m.jsonl", *there)
    with pytest.raises(UserError) as caught:
        check_epochs(path, state)
    assert str(caught.value).startswith(f"{path}: {fault}")
    assert "Restore it, or start anew with --run.resume never" in str(caught.value)


def test_a_missing_file_has_no_rows(tmp_path: Path) -> None:
    check_epochs(tmp_path / "m.jsonl", 0)
    with pytest.raises(UserError, match="lacks epoch 1, but"):
        check_epochs(tmp_path / "m.jsonl", 1)


def test_bytes_that_are_no_text_are_named_by_their_line(tmp_path: Path) -> None:
    path = with_epochs(tmp_path / "m.jsonl", 1)
    path.write_bytes(path.read_bytes() + b"\xff\xfe\n")
    with pytest.raises(UserError, match="line 4: not a row of metrics"):
        read_rows(path)
