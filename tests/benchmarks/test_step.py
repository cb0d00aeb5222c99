import json
from functools import partial
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import step, step_times
from benchmarks.step_times import OTHER, PARTS, Clock
from tests.folders import image_folder
from trainer.report.figures import write_figure


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Return the list of times that the clock reads next."""
    times: list[float] = [0.0]
    monkeypatch.setattr("benchmarks.step_times.time.perf_counter", lambda: times.pop(0))
    return times


def test_nested_parts_count_once(ticks: list[float]) -> None:
    clock = Clock(torch.device("cpu"))
    ticks += [1.0, 3.0, 7.0, 12.0, 13.0]
    with clock.measure("data wait"), clock.measure("host to device"):
        pass
    clock.switch(OTHER)
    assert clock.seconds == {OTHER: 2.0, "data wait": 2.0 + 5.0, "host to device": 4.0}


def test_all_parts_of_the_real_loop_are_measured(tmp_path: Path) -> None:
    data = image_folder(tmp_path / "images", {"train": {"one": 6, "two": 6}, "val": {"one": 2, "two": 2}})
    options = {
        "data.root": data,
        "data.image_size": 32,
        "data.num_workers": 0,
        "run.dir": tmp_path / "run",
        "run.device": "cpu",
        "run.threads": 1,
        "model.name": "shufflenet_v2_x0_5",
        "model.weights": "null",
        "train.epochs": 3,
        "train.batch_size": 5,
    }
    record = tmp_path / "record.json"
    assert step_times.main(record, [f"--{key}={value}" for key, value in options.items()]) == 0
    measured = json.loads(record.read_text())
    assert (measured["steps"], measured["images"]) == (6, 24)  # of the second and third epoch
    assert list(measured["seconds"]) == [*PARTS]
    assert all(seconds > 0 for seconds in measured["seconds"].values())
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    whole = sum(row["seconds"] for row in rows if row["kind"] == "epoch" and row["epoch"] > 1)
    # Evaluation and checkpoints do not count. A busy machine adds some time around the epochs' own clock.
    assert 0.95 * whole < sum(measured["seconds"].values()) < 2 * whole


def test_the_picture_and_the_table_show_every_row(tmp_path: Path) -> None:
    rows = {name: dict(zip(PARTS, (4.0, 1.0, 20.0, 40.0, 3.0, 2.0), strict=True)) for name in ("a, fp32", "b, bf16")}
    lines = step.table(rows).splitlines()
    assert len(lines) == 4
    assert "20.00 (28.6%)" in lines[2]
    write_figure(tmp_path / "step.png", partial(step.draw, rows, title="title"), size=(9, 2.8))
    with Image.open(tmp_path / "step.png") as image:
        assert image.size == (1350, 420)
