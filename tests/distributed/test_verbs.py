"""`lr-find` and `compare` on two real processes, and on one: the same rates, losses and accuracies."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.folders import image_folder
from tests.launching import rows, run, torchrun
from trainer.commands.compare import compare
from trainer.commands.lr_find import lr_find
from trainer.distributed.signals import StopSignals

RANGE = ("--from=1e-5", "--to=1e-2", "--steps=10")
TOO_FAR = ("--from=1e-4", "--to=1e4", "--steps=25")
STRATEGIES = "d2l@optim.lr=1e-5,from-scratch@optim.lr=1e30@optim.warmup=0 steps,head-only@optim.lr=1e-4"


def tried(folder: Path, options: Sequence[str]) -> dict[str, Any]:
    """Return what both verbs come to, in this process; it may be one of several."""
    signals = StopSignals()
    tested = lr_find([*options, f"--run.dir={folder / 'range'}", *RANGE], signals)
    too_far = lr_find([*options, f"--run.dir={folder / 'far'}", *TOO_FAR], signals)
    words = [*options, f"--run.dir={folder / 'compare'}", "--seeds=1", f"--strategies={STRATEGIES}"]
    compared = [compare(words, signals) for _ in range(2)]
    return {
        "losses": list(tested.losses),
        "steps": len(too_far.losses),
        "diverged": too_far.diverged,
        "suggested": too_far.suggestion.lr,
        "accuracies": [summaries and [s.accuracy for s in summaries] for summaries in compared],
        "failures": compared[0] and [list(s.failures.values()) for s in compared[0]],
    }


@dataclass(frozen=True)
class Found:
    """What one process has found alone, what two have found together, and where each left its runs."""

    alone: dict[str, Any]
    first: dict[str, Any]
    second: dict[str, Any]
    folders: tuple[Path, Path]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("verbs")
    # 9 = 2 x 4 + 1: of the last batch of an epoch the second process has none.
    root = image_folder(folder / "images", {"train": {"a": 5, "b": 4}, "test": {"a": 2, "b": 2}})
    settings = {
        "run.device": "cpu", "run.threads": 1, "data.root": root, "data.image_size": 32, "data.num_workers": 0,
        "data.cache": folder / "cache", "model.name": "shufflenet_v2_x0_5", "model.weights": "null",
        "transfer.batch_norm": "frozen", "optim.momentum": 0, "train.epochs": 1, "train.batch_size": 4,
    }  # fmt: skip
    options = [f"--{key}={value}" for key, value in settings.items()]
    one, two = folder / "1", folder / "2"
    two.mkdir()
    run(torchrun(2, Path(__file__).with_name("verbs.py"), two, *options), cwd=folder, timeout=500)
    threads = torch.get_num_threads()
    alone = tried(one, options)
    torch.set_num_threads(threads)
    first, second = (json.loads((two / f"rank-{rank}.json").read_text()) for rank in range(2))
    return Found(alone, first, second, (one, two))


@pytest.mark.slow
def test_the_range_test_is_the_same_on_two_processes_and_ends_at_the_same_update(found: Found) -> None:
    alone, first, second = found.alone, found.first, found.second
    assert first["losses"] == second["losses"], "bit for bit, or one might go on without the other"
    assert first["losses"] == pytest.approx(alone["losses"], rel=1e-4)
    assert [first[key] for key in ("steps", "diverged", "suggested")] == [
        second[key] for key in ("steps", "diverged", "suggested")
    ]
    assert first["diverged"]
    assert alone["diverged"]
    assert abs(first["steps"] - alone["steps"]) <= 1, "an explosion magnifies the rounding"


@pytest.mark.slow
def test_the_comparison_is_the_same_on_two_processes_and_a_failure_is_a_row(found: Found) -> None:
    for each in (found.alone, found.first):
        fine, failed, other = each["failures"]
        assert (fine, other) == ([], [])
        assert "training has diverged" in failed[0]
        assert each["accuracies"][0] == each["accuracies"][1], "found finished"
    assert found.second["accuracies"] == [None, None], "rank 0 has the figures"
    note, _, head_only = STRATEGIES.split(",")
    for strategy in (note, head_only):
        (here,), (there,) = (rows(f / "compare" / strategy / "seed-0", "epoch") for f in found.folders)
        assert here["train_loss"] == pytest.approx(there["train_loss"], rel=1e-4)
        assert here["test_loss"] == pytest.approx(there["test_loss"], rel=1e-4)
        assert (here["train_seen"], here["test_seen"]) == (there["train_seen"], there["test_seen"]) == (9, 4)
