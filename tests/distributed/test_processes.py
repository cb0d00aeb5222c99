"""What processes owe one another: turns, errors, statistics, and examples counted once."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

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


@pytest.mark.slow
def test_each_process_gets_its_own_statistics_back(tmp_path: Path) -> None:
    every = results("kept_statistics", 3, tmp_path)
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
def test_what_is_met_at_a_boundary_is_everyones(tmp_path: Path) -> None:
    every = results("boundaries", 3, tmp_path)
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
def test_every_process_starts_with_the_same_head(tmp_path: Path) -> None:
    torch.manual_seed(7)
    save_file(models.squeezenet1_1(num_classes=2).state_dict(), tmp_path / "source.safetensors")
    (alone,) = results("heads", 1, tmp_path)
    every = results("heads", 2, tmp_path)
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
