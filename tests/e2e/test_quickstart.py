"""The main job with no argument, offline: fine-tuning beside the same network from scratch."""

import time
from pathlib import Path

import pytest

import regraft
from tests.launching import MAIN, accelerate_launch, rows, run

QUICKSTART = accelerate_launch("--num_processes", 1, MAIN)


def last_accuracy(folder: Path) -> float:
    return float(rows(folder, "epoch")[-1]["test_accuracy"])


@pytest.mark.slow
def test_the_quickstart_ends_with_the_two_beside_each_other(tmp_path: Path) -> None:
    offline = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9"}
    environment = {**offline, "REGRAFT_CACHE": str(tmp_path / "cache")}
    # Two threads, of which one waits for a core that another test has, take longer than one.
    command = [*QUICKSTART, "--run.threads=1"]
    said = run(command, cwd=tmp_path, environment=environment, timeout=900)
    folder = tmp_path / "runs" / "quickstart"
    fine_tuned, scratch = last_accuracy(folder), last_accuracy(folder / "baseline")
    assert fine_tuned > scratch
    ends = said.splitlines()[-12:]
    assert any("fine-tuned" in line and f"{fine_tuned:.3f}" in line for line in ends)
    assert any("from scratch" in line and f"{scratch:.3f}" in line for line in ends)
    assert any(str(folder) in line for line in ends)
    assert len(regraft.load(folder / "model.safetensors").classes) == 4
    assert len(regraft.load(folder / "pretrain" / "model.safetensors").classes) == 20

    began = time.monotonic()
    again = run(command, cwd=tmp_path, environment=environment)
    assert again.count("finished already") == 3
    assert again.splitlines()[-6:] == said.splitlines()[-6:], "a second run tells the same result"
    assert time.monotonic() - began < 60


@pytest.mark.soak
@pytest.mark.timeout(3600)
def test_fine_tuning_beats_scratch_on_every_seed(tmp_path: Path) -> None:
    for seed in range(5):
        # Pictures, order, crops and initialisation all change with the seed.
        folder = tmp_path / f"seed{seed}"
        arguments = [f"--run.seed={seed}", f"--data.seed={seed}", f"--run.dir={folder}"]
        run([*QUICKSTART, *arguments], cwd=tmp_path, timeout=900)
        fine_tuned, scratch = last_accuracy(folder), last_accuracy(folder / "baseline")
        print(f"seed {seed}: fine-tuned {fine_tuned:.3f}, from scratch {scratch:.3f}")
        assert fine_tuned > scratch
