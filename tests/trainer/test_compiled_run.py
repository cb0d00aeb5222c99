"""A run with train.compile. The backend `eager` traces the model, and runs the same operations as without it."""

from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from tests.folders import image_folder
from tests.trainer.phases import assert_equal_runs, in_folder, rewind, train, with_options
from trainer.config.resolve import resolve
from trainer.config.schema import Config
from trainer.model import compile as model_compile


def test_a_compiled_run_in_stages_equals_the_plain_one_and_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_compile, "BACKEND", "eager")
    plain = resolve(
        with_options(
            Config(),
            run={"dir": str(tmp_path / "plain"), "device": "cpu"},
            data={
                "root": str(image_folder(tmp_path / "images", {"train": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}})),
                "image_size": 32, "num_workers": 0, "cache": str(tmp_path / "cache"),
            },
            model={"name": "squeezenet1_1", "weights": None},
            transfer={"trainable": {0: "head", 1: "all"}},
            regularization={"ema": 0.9},
            train={"epochs": 2, "batch_size": 3, "precision": "fp32"},
            checkpoint={"keep_last": 9},
        )
    )  # fmt: skip
    compiled = with_options(in_folder(plain, tmp_path / "compiled"), train={"compile": True})
    train(plain)
    torch.compiler.reset()
    counters.clear()
    train(compiled)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] == 5, "batches of 3 and 2 in two stages, and the evaluation"
    assert_equal_runs(plain, compiled)
    rewind(compiled, 2, 1)
    train(compiled)
    assert_equal_runs(plain, compiled)
