"""Runs with a model of timm: the options for transfer learning, and a second run from the first one's model file."""

from pathlib import Path

import regraft
from tests.e2e.conftest import Options, Train
from tests.launching import rows


def test_options_combine_with_a_model_of_timm(options: Options, train: Train, images: Path, tmp_path: Path) -> None:
    name = "timm/test_efficientnet"
    output = train(
        0,
        options(
            model__name=name,
            model__stochastic_depth=0.1,
            transfer__trainable="{0: head, 1: all}",
            optim__layer_decay=0.8,
            regularization__ema=0.9,
            train__gradient_checkpointing="true",
        ),
    )
    assert f"{name}: new output layer classifier" in output
    assert "stochastic depth up to 0.08" in output
    first = tmp_path / "run" / "model.safetensors"
    options_of_second = {
        "run__dir": tmp_path / "second", "model__name": f"{name}.r160_in1k", "model__weights": first,
        "model__head_init": "linear-probe", "transfer__trainable": "last:3", "data__augment": "none",
    }  # fmt: skip
    output = train(0, options(**options_of_second))
    assert "86 of the backbone's 86 tensors" in output
    assert "linear probe: features 22 x 256" in output
    assert "frozen layers: the input of blocks.4.0" in output

    loaded = regraft.load(tmp_path / "second")
    paths = sorted((images / "val").rglob("*.png"))
    correct = sum(
        prediction.label == path.parent.name
        for prediction, path in zip(loaded.predict([str(path) for path in paths]), paths, strict=True)
    )
    best = max(row["test_correct"] for row in rows(tmp_path / "second", "epoch"))
    assert abs(correct - best) <= 1, "sums are rounded differently in other batches"
    assert loaded.metadata.architecture == f"{name}.r160_in1k"
