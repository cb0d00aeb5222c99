import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from trainer.report.comparison import (
    _STUDENT,
    Trial,
    draw_comparison,
    half_interval,
    markdown,
    notes,
    summarize,
    table,
    trial_of,
)


def trial(seed: int, *reached: float, seconds: float = 10.0) -> Trial:
    curve = tuple((seconds * (i + 1), accuracy) for i, accuracy in enumerate(reached))
    return Trial(seed=seed, accuracy=reached[-1], curve=curve, epochs=len(reached), rate=8.0)


def epoch(number: int, test: float, val: float | None = None) -> dict[str, Any]:
    row = {
        "kind": "epoch", "epoch": number, "test_accuracy": test, "test_loss": 1.0, "seconds": 10.0 * number,
        "train_seen": 60,
    }  # fmt: skip
    return row if val is None else {**row, "val_accuracy": val, "val_loss": 1.0}


def test_the_constants_are_students() -> None:
    for degrees, constant in enumerate(_STUDENT, start=1):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        x = np.linspace(0, constant, 200_001)
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=3e-5), degrees


def test_the_interval_is_that_of_a_mean_of_few() -> None:
    assert half_interval([0.9]) is None
    assert half_interval([0.9, 0.8]) == pytest.approx(12.706 * 0.1 / 2)
    assert half_interval([0.7, 0.8, 0.9]) == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    assert half_interval([0.5, 0.6] * 20) == pytest.approx(
        2.042 * np.std([0.5, 0.6] * 20, ddof=1) / math.sqrt(40)
    )


def test_a_trial_adds_up_its_epochs_and_what_came_before_them() -> None:
    rows = [
        {"kind": "start", "epoch": 0, "seconds": 4.0, "test_accuracy": 0.7},
        {"kind": "train", "epoch": 0.5, "train_accuracy": 1.0},
        epoch(1, 0.8),
        epoch(2, 0.9),
    ]
    found = trial_of(rows, seed=3, selection=None)
    assert found.curve == ((4, 0.7), (14, 0.8), (34, 0.9))
    assert (found.seed, found.accuracy, found.seconds, found.epochs) == (3, 0.9, 34, 2)
    assert found.rate == 120 / 30, "examples trained on over the epochs' own seconds"
    assert [found.seconds_to(a) for a in (0.7, 0.75, 0.9, 0.91)] == [4, 14, 34, None]


def test_with_a_part_to_select_on_the_selected_epoch_is_what_counts() -> None:
    rows = [epoch(1, 0.6, 0.9), epoch(2, 0.8, 0.5)]
    assert trial_of(rows, seed=0, selection="val").accuracy == 0.6
    assert trial_of(rows, seed=0, selection=None).accuracy == 0.8


def test_the_others_are_measured_by_the_firsts_mean() -> None:
    first, quick, half, never = summarize(
        {
            "first": [trial(0, 0.5, 0.8), trial(1, 0.5, 0.9)],
            "quick": [trial(0, 0.86, 0.7, seconds=2), trial(1, 0.5, 0.85, seconds=2)],
            "half": [trial(0, 0.9), trial(1, 0.8)],
            "never": [trial(0, 0.1)],
        },
        {"never": {1: "diverged: x"}},
    )
    assert first.accuracy == pytest.approx(0.85)
    assert (first.seconds, first.reached, first.to_first) == (20, 1, None)
    assert (quick.to_first, quick.reached, quick.share) == (3.0, 2, 0.15)
    assert (half.to_first, half.reached, half.share) == (None, 1, None)
    assert (never.reached, never.half, never.failures) == (0, None, {1: "diverged: x"})


def test_a_single_seed_reaches_its_own_accuracy_when_it_first_has_it() -> None:
    (found,) = summarize({"only": [trial(0, 0.1, 1 / 3, 0.2, 1 / 3)]}, {})
    assert (found.to_first, found.share, found.half) == (20, 0.5, None)


def test_equal_accuracies_reach_their_mean_whatever_its_rounding() -> None:
    value = 0.9346405228758170
    (found,) = summarize({"only": [trial(seed, value) for seed in range(7)]}, {})
    assert found.reached == 7


def test_where_the_first_has_failed_nothing_is_measured_by_it() -> None:
    first, other = summarize({"first": [], "other": [trial(0, 0.9)]}, {"first": {0: "bad: worse"}})
    assert (first.accuracy, other.to_first, other.share) == (None, None, None)
    assert other.accuracy == 0.9


SUMMARIES = summarize(
    {
        "d2l@optim.lr=[5e-6]|x": [trial(0, 0.5, 0.8), trial(1, 0.6, 0.9)],
        "strong-regularization": [trial(0, 0.9, 0.95), trial(1, 0.9, 0.95)],
        "gone": [],
    },
    {"gone": {0: "the loss is not finite: training has diverged.\n  a.png", 1: "the same"}},
)


def test_the_table_fits_a_terminal_and_cuts_no_name() -> None:
    console = Console(width=80, markup=False, highlight=False, record=True)
    console.print(table(SUMMARIES))
    shown = console.export_text()
    for text in ("d2l@optim.lr=[5e-6]|x", "strong-regularization", "0.850 ± 0.635", "0.950 ± 0.000"):
        assert text in shown
    lines = {line.split()[0]: line.split() for line in shown.splitlines() if line.split()}
    assert lines["strategy"] == ["strategy", "accuracy", "time", "[s]", "ex/s", "to", "first", "share"]
    assert lines["strong-regularization"][-2:] == ["10.0", "0.50"]
    assert lines["gone"] == ["gone", "failed", "-", "-", "-", "-"]


def test_epochs_are_told_where_they_differ() -> None:
    console = Console(width=80, markup=False, record=True)
    console.print(table(summarize({"a": [trial(0, 0.5, 0.8)], "b": [trial(0, 0.5), trial(1, 0.5, 0.6)]}, {})))
    shown = console.export_text()
    assert "epochs" in shown
    assert "1/2" in shown


def test_the_markdown_holds_command_facts_rows_and_reasons() -> None:
    text = markdown(SUMMARIES, command="regraft compare --strategies x", facts=["two cores"])
    assert "regraft compare --strategies x" in text
    assert "- two cores" in text
    assert "| d2l@optim.lr=[5e-6]\\|x | 0.850 ± 0.635 | 2 | 20.0 | 8.0 | - (1 of 2) | - |" in text
    assert "| gone | failed: the loss is not finite | - | - | - | - | - |" in text
    assert "- gone, seed 0 failed: the loss is not finite: training has diverged." in text
    assert "a.png" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row.replace("\\|", "").split("|")) for row in rows}) == 1
    assert "one seed" in notes(summarize({"a": [trial(0, 0.5)]}, {}))[0]


def test_the_figure_has_a_line_for_each_strategy_that_ran(tmp_path: Path) -> None:
    draw_comparison(SUMMARIES, tmp_path / "c.png", title="$x_1$, 图片")
    with Image.open(tmp_path / "c.png") as image:
        colours = {colour for _, colour in image.convert("RGB").getcolors(maxcolors=1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colours, "matplotlib's first and second"
    assert (44, 160, 44) not in colours
