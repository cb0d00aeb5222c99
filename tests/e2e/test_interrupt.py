"""Ctrl-C, as a terminal sends it: to every process of the foreground group."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.e2e.conftest import Options
from tests.launching import MAIN, rows, run, torchrun


def start(command: list[str | Path], cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [str(part) for part in command],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # a group of its own
    )


def wait_for_epoch(process: subprocess.Popen[str], folder: Path, epoch: int) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            break
        if (folder / "last.safetensors").exists() and len(rows(folder, "epoch")) >= epoch:
            return
        time.sleep(0.05)
    raise AssertionError(f"epoch {epoch} did not come: {process.communicate()[0]}")


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_ctrl_c_leaves_whole_epochs_and_the_same_command_goes_on(
    processes: int, options: Options, tmp_path: Path
) -> None:
    settings = {"train__epochs": 60, "transfer__batch_norm": "frozen", "data__workers": 1}
    program = [sys.executable, MAIN] if processes == 1 else torchrun(processes, MAIN)
    process = start([*program, *options(**settings)], tmp_path)
    wait_for_epoch(process, tmp_path / "run", 2)
    os.killpg(process.pid, signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    if processes == 1:
        assert process.returncode == 130
        assert "Traceback" not in said
    assert "interrupted: what the run folder holds is whole" in said
    assert not [path.name for path in (tmp_path / "run").iterdir() if path.name.endswith(".tmp")]
    done = len(rows(tmp_path / "run", "epoch"))
    assert 2 <= done < 60

    # To the end, from there and in one go.
    shorter = {**settings, "data__workers": 0}
    said = run([*program, *options(**shorter)], cwd=tmp_path)
    assert "going on after epoch" in said
    run([*program, *options(**shorter, run__dir=tmp_path / "whole")], cwd=tmp_path)
    epochs, whole = (rows(tmp_path / name, "epoch") for name in ("run", "whole"))
    assert [row["epoch"] for row in epochs] == list(range(1, 61)), "no hole and no repetition"
    if processes == 1:
        ends, ends_whole = (load_file(tmp_path / name / "last.safetensors") for name in ("run", "whole"))
        assert all(torch.equal(ends[key], ends_whole[key]) for key in ends)
    for name in ("train_loss", "train_accuracy", "test_accuracy", "test_loss", "step", "lr_head"):
        assert [row[name] for row in epochs] == [row[name] for row in whole]
