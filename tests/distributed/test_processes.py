"""What processes owe one another: turns, errors, statistics, and examples counted once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.launching import run, torchrun

WORKERS = Path(__file__).with_name("workers.py")


def results(name: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    program = [sys.executable, WORKERS] if processes == 1 else torchrun(processes, WORKERS)
    run([*program, name, folder / "out"], cwd=folder)
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


@pytest.mark.slow
def test_what_rank_0_makes_the_others_find(tmp_path: Path) -> None:
    assert [result["found"] for result in results("in_turn", 3, tmp_path)] == [False, True, True]


@pytest.mark.slow
def test_an_error_of_one_is_everyones(tmp_path: Path) -> None:
    expected = ["rank 0 has failed", "rank 1 has failed"]
    assert [result["said"] for result in results("error_of_one", 2, tmp_path)] == [expected, expected]


@pytest.mark.slow
def test_running_statistics_are_averaged_but_for_frozen_layers(tmp_path: Path) -> None:
    first, second = results("statistics", 2, tmp_path)
    assert first["mean"][:2] == second["mean"][:2] == [[5.0, 5.0], [6.0, 6.0, 6.0]]
    assert first["var"][:2] == second["var"][:2] == [[1.5, 1.5], [1.5, 1.5, 1.5]]
    assert (first["mean"][2], second["mean"][2]) == ([2.0], [12.0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_example_is_evaluated_once(processes: int, tmp_path: Path) -> None:
    (alone,) = results("evaluation", 1, tmp_path)
    every = results("evaluation", processes, tmp_path)
    assert sorted(example for result in every for example in result["mine"]) == list(range(7))
    for result in every:
        assert (result["correct"], result["support"]) == (alone["correct"], alone["support"])
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)
