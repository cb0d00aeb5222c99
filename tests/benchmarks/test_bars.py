import argparse
import math
import statistics
from dataclasses import fields, replace
from pathlib import Path

import pytest

from benchmarks import bars, checkpoint, measure
from benchmarks.measure import Program, Result
from benchmarks.scenarios import SCENARIOS, Bar, Setting

pytestmark = pytest.mark.usefixtures("_keep_threads")
SETTING = Setting(threads=2, epochs=3, batch_size=64, lr=1e-2, weights=Path("w.safetensors"), peers=("d2l_loop",))
OURS, OTHER = Program(name="regraft", threads=2), Program(name="d2l_loop", precision="fp32", threads=2)
BAR = Bar(scenario="d2l", ours=OURS, other=OTHER, metric="training", asked=2.0)


@pytest.fixture
def _keep_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.set_num_threads", lambda threads: None)


def results(speed: float, accuracy: float) -> list[Result]:
    """Return five rounds whose speeds vary by a few percent around `speed`."""
    rates = [speed * factor for factor in (0.98, 0.99, 1.0, 1.01, 1.02)]
    return [Result(first=1, later=rate, accuracy=accuracy, cold=5, work=10, seconds=20) for rate in rates]


@pytest.mark.parametrize(
    ("ours", "other", "met"),
    [
        ((30, 0.9), (10, 0.9), "yes"),
        ((19, 0.9), (10, 0.9), "no"),
        ((30, 0.8), (10, 0.9), "no"),  # faster, but less accurate
        ((30, math.nan), (10, math.nan), "yes"),  # the model alone has no accuracy
    ],
)
def test_table_compares_the_median_with_what_is_asked(
    ours: tuple[float, float], other: tuple[float, float], met: str
) -> None:
    labels = bars.programs([BAR])
    values = dict(zip(labels, (results(*ours), results(*other), results(*ours)), strict=True))
    row = bars.table([BAR], values).splitlines()[-1]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[3:5] == ["2.0", f"**{ours[0] / other[0]:.2f}**"]
    assert cells[6].startswith("1.00")
    assert cells[-1] == met


def test_programs_that_several_bars_share_run_once_per_round() -> None:
    shared = [bar for name in ("d2l", "layer4", "head_only") for bar in SCENARIOS[name](SETTING)]
    labels = bars.programs(shared)
    assert sum(program.name == "d2l_loop" for program in labels.values()) == 1
    assert sum(label.endswith(bars.CONTROL) for label in labels) == 3


def test_labels_tell_all_programs_of_all_scenarios_apart() -> None:
    distinct = {program for name in SCENARIOS for bar in SCENARIOS[name](SETTING) for program in (bar.ours, bar.other)}
    assert len({bars.key(program) for program in distinct}) == len(distinct)


def test_equal_arithmetic_fixes_precision_and_layout_of_all_programs() -> None:
    for bar in SCENARIOS["equal_arithmetic"](SETTING):
        for program in (bar.ours, bar.other):
            assert {"--precision=fp32", "--layout=channels_last"} <= {*program.options()}


def test_every_program_reads_the_options_that_it_is_given(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from benchmarks.peers.common import Settings, read_settings

    program = replace(
        OURS,
        weights=Path("w"),
        config=Path("c"),
        fixed_views=True,
        lr=0.5,
        reduction="sum",
        workers=3,
        extra=("a.b=1",),
    )
    words = [f"--data-root={tmp_path}", f"--record={tmp_path / 'r'}", "--seed=7", *program.options()]
    monkeypatch.setattr("sys.argv", ["program", *words])
    settings = read_settings()
    shared = {field.name for field in fields(Settings)} & {field.name for field in fields(Program)}
    assert len(shared) == 14
    assert all(getattr(settings, name) == getattr(program, name) for name in shared)
    assert settings.seed == 7


def test_hymenoptera_needs_real_photographs_and_weights() -> None:
    arguments = argparse.Namespace(
        only=["hymenoptera"], threads=2, epochs=3, batch_size=64, lr=0.1, weights=None, data_root=None, peers=None
    )
    with pytest.raises(SystemExit, match="--weights"):
        bars.selected_bars(arguments)


def test_the_recorded_command_has_no_folders_of_this_machine() -> None:
    assert bars.command_line(["bars", "--data-root", "/data/ants", "--pairs", "5"]).endswith(
        "--data-root ants --pairs 5"
    )


def test_interval_of_the_median_contains_it() -> None:
    values = [0.9, 1.0, 1.1, 1.2, 5.0]
    median, low, high = measure.median_interval(values)
    assert (median, low, high) == (statistics.median(values), 0.9, 5.0)
    assert measure.median_interval([1.5]) == (1.5, 1.5, 1.5)


def test_one_pair_of_checkpoint_epochs_has_no_standard_error() -> None:
    assert checkpoint.summary([1.01]) == "median ratio 1.010 of 1 (1.010 to 1.010), mean 1.010"
    assert "(standard error 0.100)" in checkpoint.summary([1.0, 1.2])


@pytest.mark.parametrize("scenario", [*SCENARIOS])
def test_regraft_knows_the_options_of_every_scenario(
    scenario: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from benchmarks.peers.common import read_settings
    from benchmarks.peers.regraft import options_of
    from trainer.config.parse import parse

    for bar in SCENARIOS[scenario](SETTING):
        words = [f"--data-root={tmp_path}", f"--record={tmp_path / 'r'}", "--seed=7", *bar.ours.options()]
        monkeypatch.setattr("sys.argv", ["program", *words])
        config = parse([f"--{key}={value}" for key, value in options_of(read_settings(), tmp_path).items()])
        assert config.run.seed == 7
        assert config.train.epochs == bar.ours.epochs
        assert config.train.batch_size == bar.ours.batch_size
        assert (config.optim.lr, config.optim.loss_reduction) == (bar.ours.lr, bar.ours.reduction)
        assert (config.optim.momentum, config.optim.schedule) == (0.0, "constant")
