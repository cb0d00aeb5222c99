"""`lr-find` and `compare` on two real processes, and on one: the same rates, losses and accuracies."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.distributed.verbs import STRATEGIES
from tests.folders import image_folder
from tests.launching import rows, run, torchrun

WORKER = Path(__file__).with_name("verbs.py")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[dict[str, Any]]]:
    """Return number of processes -> what each of them has found."""
    folder = tmp_path_factory.mktemp("verbs")
    # 9 = 2 x 4 + 1: in the last batch of an epoch the second process has no share.
    root = image_folder(folder / "images", {"train": {"a": 5, "b": 4}, "test": {"a": 2, "b": 2}})
    settings = {
        "run.device": "cpu", "run.threads": 1, "data.root": root, "data.image_size": 32, "data.workers": 0,
        "data.cache": folder / "cache", "model.name": "resnet18", "model.weights": "null",
        "transfer.batch_norm": "frozen", "optim.momentum": 0, "train.epochs": 1, "train.batch_size": 4,
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in settings.items()]
    for processes in (1, 2):
        (folder / str(processes)).mkdir()
        run(torchrun(processes, WORKER, folder / str(processes), *options), cwd=folder, timeout=500)
    return {
        processes: [
            json.loads((folder / str(processes) / f"rank-{rank}.json").read_text())
            for rank in range(processes)
        ]
        + [{"folder": folder / str(processes)}]
        for processes in (1, 2)
    }


@pytest.mark.slow
def test_the_range_test_is_the_same_on_two_processes_and_ends_at_the_same_update(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    (alone, _), (first, second, _) = found[1], found[2]
    assert first["losses"] == second["losses"], "bit for bit, or one might go on without the other"
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert (first["steps"], first["diverged"], first["suggested"]) == (
        second["steps"], second["diverged"], second["suggested"],
    )  # fmt: skip
    assert first["diverged"]
    assert alone["diverged"]
    assert abs(first["steps"] - alone["steps"]) <= 1, "an explosion magnifies the rounding"


@pytest.mark.slow
def test_the_comparison_is_the_same_on_two_processes_and_a_failure_is_a_row(
    found: dict[int, list[dict[str, Any]]],
) -> None:
    (alone, one), (first, second, two) = found[1], found[2]
    for each in (alone, first):
        fine, failed, other = each["failures"]
        assert (fine, other) == ([], [])
        assert "training has diverged" in failed[0]
        assert each["accuracies"][0] == each["accuracies"][1], "found finished"
    assert second["accuracies"] == [None, None], "rank 0 has the figures"
    for strategy in (STRATEGIES.split(",")[0], STRATEGIES.split(",")[2]):
        (here,), (there,) = (rows(f["folder"] / "compare" / strategy / "seed-0", "epoch") for f in (one, two))
        assert here["train_loss"] == pytest.approx(there["train_loss"], rel=1e-4)
        assert here["test_loss"] == pytest.approx(there["test_loss"], rel=1e-4)
        assert (here["train_seen"], here["test_seen"]) == (there["train_seen"], there["test_seen"]) == (9, 4)
