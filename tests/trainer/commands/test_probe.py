import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from tests.folders import image_folder
from trainer.commands import measure, probe


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(measure, "SECONDS", 0.05)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def told(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len({line["probe"] for line in lines}) == len(lines), "each is told once"
    return {line.pop("probe"): line for line in lines}


def options(root: str | Path, tmp_path: Path, *more: str) -> list[str]:
    return [
        f"--data.root={root}",
        "--data.image_size=32",
        f"--data.cache={tmp_path / 'cache'}",
        f"--run.dir={tmp_path / 'run'}",
        "--run.device=cpu",
        "--run.threads=1",
        "--model.name=squeezenet1_1",
        *more,
    ]


def test_everything_that_a_run_needs_is_measured_and_nothing_written_but_to_its_folder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 3, "b": 2}, "test": {"a": 1, "b": 1}})
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    changes = ["--optim.name=adamw", "--train.batch_size=6", "--model.head_init=source-labels"]
    changes += [
        "--transfer.l2_sp=0.1",
        "--baseline.lr=0.1",
        "--transfer.wise_ft=true",
        "--regularization.ema=0.9",
    ]
    probe.pace(scratch, 2, options(root, tmp_path, *changes))
    found = told(capsys)
    assert {name: one for name, one in found.items() if "error" in one} == {}
    assert list(found) == ["build", "vision", "config", "read", "decode", "model", "step", "write"]
    assert found["build"]["torch"] == torch.__version__
    assert found["config"] == {
        "model": "squeezenet1_1",
        "batch_size": 6,
        "images": f"5 of 5 in {root}",
    }
    for name in ("read", "decode", "step"):
        assert found[name]["images_per_second"] > 0
    assert found["step"]["examples"] == 3, "a process's share"
    assert found["step"]["device"] == "cpu"
    # The weights, their average, and AdamW's two moments of each; the line's ends and its best point.
    weights = found["model"]["gradient_bytes"]
    assert found["model"]["checkpoint_bytes"] == pytest.approx(4 * weights, rel=0.01)
    assert found["model"]["kept_bytes"] == pytest.approx((4 * 4 + 3) * weights, rel=0.01)
    assert found["write"]["bytes"] <= found["model"]["checkpoint_bytes"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "scratch"]
    assert list(scratch.iterdir()) == []


def test_a_data_set_known_by_name_is_not_fetched_but_stood_in_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_DRAWN", 3)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    probe.pace(scratch, 1, options("hotdog", tmp_path))
    found = told(capsys)
    assert found["config"]["images"] == "drawn JPEG files of 500 x 375, in place of hotdog"
    assert found["decode"]["images_per_second"] > 0
    pictures = sorted(scratch.glob("*.jpg"))
    assert len(pictures) == 3
    assert Image.open(pictures[0]).size == (500, 375)
    assert 20_000 < pictures[0].stat().st_size < 200_000, "about a photograph's"
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--optim.lrr=1"], "there is no option 'optim.lrr'"),
        (["--data.root=/nowhere"], "data.root is '/nowhere'"),
        (["--model.name=resnet1"], "there is no model 'resnet1'"),
    ],
)
def test_what_is_wrong_with_the_options_is_told_as_the_trainer_tells_it(
    more: list[str], expected: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    probe.pace(tmp_path, 1, [*options("hotdog", tmp_path), *more])
    found = told(capsys)
    assert expected in found["config"]["error"]
    assert not found["config"]["error"].startswith("UserError")
    assert set(found) == {"build", "vision", "config"}


def test_what_cannot_be_measured_does_not_keep_the_rest_from_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = image_folder(tmp_path / "images", {"train": {"a": 1, "b": 1}, "test": {"a": 1, "b": 1}})
    for path in (root / "train").rglob("*.png"):
        path.write_bytes(b"no picture")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "writing", full)
    probe.pace(tmp_path, 1, options(root, tmp_path))
    found = told(capsys)
    assert "cannot be read" in found["decode"]["error"]
    assert found["write"]["error"] == "OSError: [Errno 28] No space left on device"
    assert found["read"]["images_per_second"] > 0
    assert found["step"]["images_per_second"] > 0


def test_writing_stops_when_its_time_is_over_and_removes_what_it_wrote(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_CHUNK", 1000)
    monkeypatch.setattr(measure, "SECONDS", 1e6)  # however busy the disk is
    assert measure.writing(tmp_path, 2500)["bytes"] == 2500
    monkeypatch.setattr(measure, "SECONDS", -1.0)
    assert measure.writing(tmp_path, 2500)["bytes"] == 1000
    assert list(tmp_path.iterdir()) == []
