"""What processes owe one another: turns, errors, statistics, and examples counted once."""

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from tests.launching import run, torchrun

WORKERS = Path(__file__).with_name("workers.py")


TOGETHER = {
    1: ("evaluation", "heads"),
    2: ("error_of_one", "statistics", "evaluation", "heads"),
    3: ("in_turn", "evaluation", "kept_statistics", "boundaries"),
}
"""Number of processes -> what one start of so many does, one after the other: to start them takes longest."""


def work(names: Sequence[str], processes: int, folder: Path) -> None:
    """Have so many processes do what the names of workers.py stand for, in turn."""
    program = [sys.executable, WORKERS] if processes == 1 else torchrun(processes, WORKERS)
    run([*program, folder / "out", *names], cwd=folder)


def read(name: str, processes: int, folder: Path) -> list[dict[str, Any]]:
    """Return what each process has found."""
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(processes)]


Results = Callable[[str, int], list[dict[str, Any]]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return a function (name, processes) -> what each process has found."""
    folders: dict[int, Path] = {}

    def found(name: str, processes: int) -> list[dict[str, Any]]:
        if processes not in folders:
            folders[processes] = folder = tmp_path_factory.mktemp("processes")
            torch.manual_seed(7)
            save_file(models.squeezenet1_1(num_classes=2).state_dict(), folder / "source.safetensors")
            work(TOGETHER[processes], processes, folder)
        return read(name, processes, folders[processes])

    return found


@pytest.mark.slow
def test_what_rank_0_makes_the_others_find(results: Results) -> None:
    assert [result["found"] for result in results("in_turn", 3)] == [False, True, True]


@pytest.mark.slow
def test_an_error_of_one_is_everyones(results: Results) -> None:
    expected = ["rank 0 has failed", "rank 1 has failed"]
    assert [result["said"] for result in results("error_of_one", 2)] == [expected, expected]


@pytest.mark.slow
def test_running_statistics_are_averaged_but_for_frozen_layers(results: Results) -> None:
    first, second = results("statistics", 2)
    assert first["mean"][:2] == second["mean"][:2] == [[5.0, 5.0], [6.0, 6.0, 6.0]]
    assert first["var"][:2] == second["var"][:2] == [[1.5, 1.5], [1.5, 1.5, 1.5]]
    assert (first["mean"][2], second["mean"][2]) == ([2.0], [12.0])


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_every_example_is_evaluated_once(processes: int, results: Results) -> None:
    (alone,) = results("evaluation", 1)
    every = results("evaluation", processes)
    assert sorted(example for result in every for example in result["mine"]) == list(range(7))
    for result in every:
        assert (result["correct"], result["support"]) == (alone["correct"], alone["support"])
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-6)


@pytest.mark.slow
def test_each_process_gets_its_own_statistics_back(results: Results) -> None:
    every = results("kept_statistics", 3)
    names = [
        f"{layer}.{key}" for layer in (0, 1) for key in ("running_mean", "running_var", "num_batches_tracked")
    ]
    for rank, result in enumerate(every):
        assert result["restored"] == result["mine"] != result["averaged"]
        assert result["gathered"] == every[0]["gathered"]
        assert [result["gathered"][f"{rank}.{name}"] for name in names] == result["mine"]
    assert every[0]["mine"] != every[1]["mine"] != every[2]["mine"]
    assert len(every[0]["gathered"]) == 3 * len(names), "nothing of the frozen layer"
    # Another number of processes begins with the average.
    for result in every:
        assert result["elsewhere"][0] == pytest.approx(result["averaged"][0], rel=1e-6)
        assert result["elsewhere"][1] == pytest.approx(result["averaged"][1], rel=1e-6)
        assert result["elsewhere"][2] == 999


@pytest.mark.slow
def test_what_is_met_at_a_boundary_is_everyones(results: Results) -> None:
    every = results("boundaries", 3)
    for result in every:
        assert result["agreed"] == [2, 2, 3], "of each flag the greatest"
        assert result["from_main"] == {"rank": 0}
        assert result["rows"] == result["again"] == [[0.0, 0, 0], [0.2, 2, 2], [0.4, 4, 4]], (
            "to go on from, exactly"
        )
        assert (result["bad_step"], result["first_bad_step"]) == (None, 6)
        assert result["of_more"] == [2.0, 4, 8, True], "of four processes, on three: the same in all"
        assert (result["ended"], result["rounds"], result["training"]) == (True, 2, True)


@pytest.mark.slow
def test_every_process_starts_with_the_same_head(results: Results) -> None:
    (alone,) = results("heads", 1)
    every = results("heads", 2)
    for result in every:
        assert result["copied"] == alone["copied"]
        assert result["norms"] == pytest.approx([result["norms"][1]] * 3), "new rows level with copied ones"
        for part in ("of 7", "of 1"):
            assert result[part]["model"] == every[0][part]["model"], "bit for bit"
            # Features of other batches are rounded another way, which moves the solution a little.
            theirs, ours = (torch.tensor(found[part]["logits"]).softmax(1) for found in (alone, result))
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-2)
        assert "features 7 x 512 in" in result["of 7"]["said"]
        assert "not chosen: no class has a second image" in result["of 1"]["said"]
        assert "the model's logits are not classifier.1 on the mean" in result["refused"]
        assert result["kept"] == pytest.approx(0.75, abs=0.02)
    assert every[0]["mask"] == alone["mask"] != every[1]["mask"], "masks belong to (seed, step, process)"
