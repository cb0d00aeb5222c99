"""Real photographs and real pretrained weights (shared data): the note's method reaches what it should."""

from pathlib import Path

import pytest
from PIL import Image

import trainer
from tests.launching import MAIN, REPOSITORY, accelerate_launch, rows, run

WEIGHTS = "squeezenet1_1-imagenet1k-fp16.safetensors"


@pytest.mark.slow
@pytest.mark.shared
def test_ants_and_bees_by_the_notes_method(shared: Path, tmp_path: Path) -> None:
    said = run(
        [
            *accelerate_launch("--num_processes", 1, MAIN),
            *("--config", REPOSITORY / "configs" / "hymenoptera.yaml"),
            *("--data.root", shared / "data" / "hymenoptera"),
            *("--model.weights", shared / "weights" / WEIGHTS),
            *("--run.dir", tmp_path / "run"),
        ],
        cwd=tmp_path,
        timeout=900,
    )
    assert "50 of the backbone's 50 tensors" in said
    assert "1 .gif" in said, "what is passed over is said"
    epochs = rows(tmp_path / "run", "epoch")
    assert [(row["train_seen"], row["test_seen"]) for row in epochs] == [(244, 153)] * 5
    assert epochs[-1]["test_accuracy"] >= 0.80
    assert epochs[-1]["train_loss"] < epochs[0]["train_loss"]

    # The file that is left is enough to predict with, and predicts what the run has reported.
    model, preprocess, classes = trainer.load(tmp_path / "run" / "model.safetensors")
    best = max(epochs, key=lambda row: (row["test_accuracy"], -row["test_loss"]))
    right = 0
    for label, name in enumerate(classes):
        for path in sorted((shared / "data" / "hymenoptera" / "val" / name).iterdir()):
            with Image.open(path) as picture:
                right += int(model(preprocess(picture)[None]).argmax().item() == label)
    assert classes == ("ants", "bees")
    # One image at a time, another order of the sums: a picture on the very border may fall to the other side.
    assert abs(right - best["test_correct"]) <= 1


@pytest.mark.slow
@pytest.mark.shared
@pytest.mark.parametrize(("head_init", "least"), [("source-labels", 0.92), ("linear-probe", 0.90)])
def test_ants_and_bees_are_told_apart_before_the_first_step(
    head_init: str, least: float, shared: Path, tmp_path: Path
) -> None:
    said = run(
        [
            *accelerate_launch("--num_processes", 1, MAIN),
            *("--data.root", shared / "data" / "hymenoptera"),
            *("--model.name", "squeezenet1_1"),
            *("--model.weights", shared / "weights" / WEIGHTS),
            *("--model.head_init", head_init),
            *("--optim.lr", "1e-4"),
            *("--train.epochs", 1),
            *("--run.dir", tmp_path / "run"),
        ],
        cwd=tmp_path,
        timeout=900,
    )
    (start,) = rows(tmp_path / "run", "start")
    assert (start["test_seen"], start["epoch"]) == (153, 0)
    assert start["test_accuracy"] >= least
    assert f"before the first step: test accuracy {start['test_accuracy']:.3f}" in said
    if head_init == "source-labels":
        assert "ants <- ant, row 310 (plural)" in said
        assert "bees <- bee, row 309 (plural)" in said
    else:
        assert "linear probe: features 244 x 512 in" in said
    assert rows(tmp_path / "run", "epoch")[-1]["test_accuracy"] >= 0.9, "and training leaves it there"
