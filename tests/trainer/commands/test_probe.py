import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.folders import image_folder
from trainer.commands import measure, probe

MEASUREMENTS = ["torch", "torchvision", "config", "decoding", "model", "training step"]
Measure = Callable[..., dict[str, dict[str, Any]]]


@pytest.fixture
def run_probe(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Measure:
    """Return a function that measures a tiny run, and returns name -> values."""

    def run(root: str | Path, *options: str, processes: int = 1) -> dict[str, dict[str, Any]]:
        tiny = ["--data.image_size=32", "--run.device=cpu", "--run.threads=1", "--model.name=squeezenet1_1"]
        folders = [f"--data.root={root}", f"--data.cache={tmp_path / 'cache'}", f"--run.dir={tmp_path / 'run'}"]
        (tmp_path / "scratch").mkdir()
        probe.measure_run(tmp_path / "scratch", processes, [*tiny, *folders, *options])
        lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
        assert len({line["probe"] for line in lines}) == len(lines), "each is measured once"
        return {line.pop("probe"): line for line in lines}

    monkeypatch.setattr(measure, "SECONDS", 0.05)
    return run


def test_all_measurements_of_a_run_write_no_files(run_probe: Measure, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}})
    options = ["--optim.name=adamw", "--train.batch_size=6", "--model.head_init=source-labels"]
    options += ["--transfer.l2_sp=0.1", "--baseline.lr=0.1", "--transfer.wise_ft=true", "--regularization.ema=0.9"]
    measured = run_probe(root, *options, processes=2)
    assert [name for name, values in measured.items() if "error" in values] == []
    assert list(measured) == MEASUREMENTS
    assert measured["torch"]["torch"] == torch.__version__
    assert measured["config"] == {"model": "squeezenet1_1", "images": f"5 of 5 images in {root}"}
    for name in ("decoding", "training step"):
        assert measured[name]["images_per_second"] > 0
    assert measured["training step"]["batch_size"] == 3, "the batch of one process"
    assert measured["training step"]["device"] == "cpu"
    # 4 checkpoints with the weights, their average and two moments of AdamW; 3 models of WiSE-FT.
    weights = measured["model"]["gradient_bytes"]
    assert measured["model"]["checkpoints_bytes"] == pytest.approx((4 * 4 + 3) * weights, rel=0.01)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "scratch"]
    assert list((tmp_path / "scratch").iterdir()) == []


def test_data_set_given_by_name_is_replaced_by_synthetic_images(
    run_probe: Measure, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_SYNTHETIC_IMAGES", 3)
    measured = run_probe("hotdog")
    assert measured["config"]["images"] == "synthetic JPEG files of 500 x 375 instead of hotdog"
    assert measured["decoding"]["images_per_second"] > 0
    images = sorted((tmp_path / "scratch").glob("*.jpg"))
    assert len(images) == 3
    assert Image.open(images[0]).size == (500, 375)
    assert 20_000 < images[0].stat().st_size < 200_000, "about the size of a photograph"
    assert not (tmp_path / "cache").exists()


def test_wrong_option_is_reported_with_the_trainers_message(run_probe: Measure) -> None:
    measured = run_probe("hotdog", "--model.name=resnet1")
    assert measured["config"]["error"].startswith("there is no model 'resnet1'")
    assert list(measured) == ["torch", "torchvision", "config"]


def test_failed_measurement_does_not_prevent_the_others(run_probe: Measure, tmp_path: Path) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"not an image")
    measured = run_probe(root)
    assert "cannot be read" in measured["decoding"]["error"]
    assert measured["training step"]["images_per_second"] > 0
