"""Moving average, L2-SP, early stopping and WiSE-FT on two real processes, and against one."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run, torchrun

pytestmark = pytest.mark.slow
WORKER = Path(__file__).with_name("move_weights.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what each process has found: one alone, and two together."""
    out = tmp_path_factory.mktemp("moving")
    for world_size in (1, 2):
        run(torchrun(world_size, WORKER, out), cwd=out)
    names = {"alone": "1-0", "first": "2-0", "second": "2-1"}
    return {who: json.loads((out / f"found-{name}.json").read_text()) for who, name in names.items()}


def flat(state: Any) -> list[float]:
    if isinstance(state, dict):
        return [value for name in sorted(state) for value in flat(state[name])]
    return [value for item in state for value in flat(item)] if isinstance(state, list) else [float(state)]


def test_average_and_pull_are_the_same_on_one_process_and_on_two(found: dict[str, Any]) -> None:
    alone, first, second = (found[who]["without"] for who in ("alone", "first", "second"))
    for who in ("model", "average", "evaluated"):
        assert flat(first[who]) == flat(second[who]), "both processes hold the same"
        assert flat(first[who]) == pytest.approx(flat(alone[who]), rel=1e-5, abs=1e-7)
    assert flat(first["model"]) != flat(first["average"])
    assert first["evaluated"][-1] == first["average"]


def test_statistics_of_the_average_are_averaged_over_the_processes_before_they_are_used(
    found: dict[str, Any],
) -> None:
    first, second = (found[who]["whole"] for who in ("first", "second"))
    for epoch, last in enumerate((2, 5)):
        a, b = first["just_before"][last], second["just_before"][last]
        assert a != b, "each process has seen other images"
        mean = [(x + y) / 2 for x, y in zip(a, b, strict=True)]
        for run_ in (first, second):
            assert run_["evaluated"][epoch]["norm.running_mean"] == pytest.approx(mean, rel=1e-6)


@pytest.mark.parametrize("place", ["within", "between"])
def test_a_run_that_goes_on_comes_to_the_same_weights_average_and_statistics(
    place: str, found: dict[str, Any]
) -> None:
    for who in ("first", "second"):
        whole, resumed = found[who]["whole"], found[who][place]
        for what in ("model", "average"):
            assert resumed[what] == whole[what], f"bit for bit, {what} of the {who} process"
        assert resumed["just_before"] == whole["just_before"][2 if place == "within" else 3 :]


def test_what_rank_0_knows_of_the_figures_ends_the_run_for_all(found: dict[str, Any]) -> None:
    assert found["first"]["over"] == found["second"]["over"] == [True, False]


def test_all_processes_walk_the_line_whose_ends_rank_0_has_read(found: dict[str, Any]) -> None:
    first, second = found["first"]["line"], found["second"]["line"]
    assert first["values"] == second["values"] == [*(tenths / 10 for tenths in range(11)), 1.0, 0.4]
    assert first["alpha"] == second["alpha"] == 0.4
    assert first["kept"] == [pytest.approx(0.4)]


def test_a_whole_run_with_all_of_them_ends_early_and_is_finished(found: dict[str, Any]) -> None:
    for who in ("first", "second"):
        made = found[who]["run"]
        # Of equal points that of the fine-tuned weights.
        assert made["alphas"] == [1.0, 1.0]
    assert found["first"]["run"]["epochs"] == [2, 2]
    assert found["first"]["run"]["states"] == [["done", 4, 4, 2, 2]] * 2
