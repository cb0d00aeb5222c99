import math
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from trainer.report import comparison
from trainer.report.comparison import Summary, Trial, confidence_half_width, markdown, summarize, trial_of
from trainer.report.figures import write_figure


def trial(seed: int, *accuracies: float, seconds: float = 10.0) -> Trial:
    curve = tuple((seconds * (i + 1), accuracy) for i, accuracy in enumerate(accuracies))
    return Trial(seed=seed, accuracy=accuracies[-1], curve=curve, epochs=len(accuracies), rate=8.0)


def epoch(number: int, test: float, val: float = 0.5) -> dict[str, Any]:
    accuracies = {"test_accuracy": test, "test_loss": 1.0, "val_accuracy": val, "val_loss": 1.0}
    return {"kind": "epoch", "epoch": number, "seconds": 10.0 * number, "train_seen": 60, **accuracies}


def test_t_quantiles_integrate_to_97_5_percent() -> None:
    for degrees, constant in enumerate(comparison._T_QUANTILES, start=1):
        scale = math.gamma((degrees + 1) / 2) / math.gamma(degrees / 2) / math.sqrt(degrees * math.pi)
        x = np.linspace(0, constant, 200_001)
        density = scale * (1 + x * x / degrees) ** (-(degrees + 1) / 2)
        assert 0.5 + np.trapezoid(density, x) == pytest.approx(0.975, abs=3e-5), degrees


def test_confidence_half_width_uses_student_t() -> None:
    assert confidence_half_width([0.9]) is None
    assert confidence_half_width([0.7, 0.8, 0.9]) == pytest.approx(4.303 * 0.1 / math.sqrt(3))
    many = [0.5, 0.6] * 20
    assert confidence_half_width(many) == pytest.approx(2.042 * np.std(many, ddof=1) / math.sqrt(40))


def test_trial_of_sums_the_seconds_of_start_and_epoch_rows() -> None:
    rows = [
        {"kind": "start", "epoch": 0, "seconds": 4.0, "test_accuracy": 0.7},
        {"kind": "train", "epoch": 0.5, "train_accuracy": 1.0},
        epoch(1, 0.8),
        epoch(2, 0.9),
    ]
    result = trial_of(rows, seed=3, selection=None)
    assert result.curve == ((4, 0.7), (14, 0.8), (34, 0.9))
    assert (result.seed, result.accuracy, result.seconds, result.epochs) == (3, 0.9, 34, 2)
    assert result.rate == 120 / 30, "training examples / seconds of the epochs"
    assert [result.seconds_to(a) for a in (0.7, 0.75, 0.9, 0.91)] == [4, 14, 34, None]
    selected = trial_of([epoch(1, 0.6, val=0.9), epoch(2, 0.8)], seed=0, selection="val")
    assert selected.accuracy == 0.6, "of the best epoch on val, not of the last"


def test_summarize_measures_time_to_the_first_strategys_mean_accuracy() -> None:
    first, fast, partial, never = summarize(
        {
            "first": [trial(0, 0.5, 0.8), trial(1, 0.5, 0.9)],
            "fast": [trial(0, 0.86, 0.7, seconds=2), trial(1, 0.5, 0.85, seconds=2)],
            "partial": [trial(0, 0.9), trial(1, 0.8)],
            "never": [trial(0, 0.1)],
        },
        {"never": {1: "diverged: x"}},
    )
    assert first.accuracy == pytest.approx(0.85)
    assert (first.seconds, first.reached, first.to_first) == (20, 1, None)
    assert (fast.to_first, fast.reached, fast.share) == (3.0, 2, 0.15)
    assert (partial.to_first, partial.reached, partial.share) == (None, 1, None)
    assert (never.reached, never.half_width, never.failures) == (0, None, {1: "diverged: x"})


def test_accuracy_is_reached_at_its_first_occurrence_despite_rounding() -> None:
    (only,) = summarize({"only": [trial(0, 0.1, 1 / 3, 0.2, 1 / 3)]}, {})
    assert (only.to_first, only.share, only.half_width) == (20, 0.5, None)
    (equal,) = summarize({"equal": [trial(seed, 0.9346405228758170) for seed in range(7)]}, {})
    assert equal.reached == 7
    failed, other = summarize({"failed": [], "other": [trial(0, 0.9)]}, {"failed": {0: "bad: worse"}})
    assert (failed.accuracy, other.to_first, other.share, other.accuracy) == (None, None, None, 0.9)


SUMMARIES = summarize(
    {
        "d2l@optim.lr=[5e-6]|x": [trial(0, 0.5, 0.8), trial(1, 0.6, 0.9)],
        "strong-regularization": [trial(0, 0.9, 0.95), trial(1, 0.9, 0.95)],
        "failing": [],
    },
    {"failing": {0: "the loss is not finite: training has diverged.\n  a.png", 1: "the same"}},
)


def printed(summaries: Sequence[Summary]) -> str:
    console = Console(width=80, markup=False, highlight=False, record=True)
    console.print(comparison.table(summaries))
    return console.export_text()


def test_table_fits_80_columns_with_complete_names() -> None:
    output = printed(SUMMARIES)
    for text in ("d2l@optim.lr=[5e-6]|x", "strong-regularization", "0.850 ± 0.635", "0.950 ± 0.000"):
        assert text in output
    lines = {line.split()[0]: line.split() for line in output.splitlines() if line.split()}
    assert lines["strategy"] == ["strategy", "accuracy", "time", "[s]", "ex/s", "to", "first", "share"]
    assert lines["strong-regularization"][-2:] == ["10.0", "0.50"]
    assert lines["failing"] == ["failing", "failed", "-", "-", "-", "-"]
    differing = printed(summarize({"a": [trial(0, 0.5, 0.8)], "b": [trial(0, 0.5), trial(1, 0.5, 0.6)]}, {}))
    assert re.search(r"epochs.*b .* 1/2 ", differing, flags=re.DOTALL)


def test_markdown_contains_command_facts_rows_and_error_messages() -> None:
    text = markdown(SUMMARIES, command="regraft compare --strategies x", facts=["two cores"])
    assert "regraft compare --strategies x" in text
    assert "- two cores" in text
    assert "| d2l@optim.lr=[5e-6]\\|x | 0.850 ± 0.635 | 2 | 20.0 | 8.0 | - (1 of 2) | - |" in text
    assert "| failing | failed: the loss is not finite | - | - | - | - | - |" in text
    assert "- failing, seed 0 failed: the loss is not finite: training has diverged." in text
    assert "a.png" not in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(row.replace("\\|", "").split("|")) for row in rows}) == 1
    assert "one seed" in comparison.notes(summarize({"a": [trial(0, 0.5)]}, {}))[0]


def test_figure_has_a_line_per_strategy_that_ran(tmp_path: Path) -> None:
    draw = partial(comparison.draw_comparison, SUMMARIES, title="$x_1$, 图片")
    write_figure(tmp_path / "c.png", draw, size=(7, 4.4))
    with Image.open(tmp_path / "c.png") as image:
        colors = {color for _, color in image.convert("RGB").getcolors(maxcolors=1 << 20) or []}
    assert {(31, 119, 180), (255, 127, 14)} <= colors, "first and second color of matplotlib"
    assert (44, 160, 44) not in colors
