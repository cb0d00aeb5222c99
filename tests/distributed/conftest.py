"""Results of ranks.py, run once per session for each number of processes."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torchvision import models

from tests.distributed.d2l_recipe import COUNTS
from tests.folders import image_folder
from tests.launching import REPOSITORY, once, run, torchrun

RankResults = Callable[[int], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def rank_inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with `images/` and the pretrained weights that ranks.py uses."""

    def make(folder: Path) -> None:
        image_folder(folder / "images", {"train": COUNTS, "test": {"a": 3, "b": 2, "c": 2}})
        torch.manual_seed(11)
        resnet = models.resnet18()
        with torch.no_grad():
            for _ in range(20):  # BatchNorm statistics that differ from a new model's
                resnet(torch.randn(16, 3, 32, 32))
        save_file(models.squeezenet1_1(num_classes=2).state_dict(), folder / "source.safetensors")
        save_file({k: v.contiguous() for k, v in resnet.state_dict().items()}, folder / "resnet18.safetensors")

    return once(tmp_path_factory, "rank-inputs", make)


@pytest.fixture(scope="session")
def rank_results(rank_inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> RankResults:
    """Return a function: number of processes -> the results of each rank."""

    def results(world_size: int) -> list[dict[str, Any]]:
        def make(folder: Path) -> None:
            (folder / "out").mkdir()
            program = ["-m", "tests.distributed.ranks", rank_inputs / "images", folder / "out"]
            launched = [sys.executable, *program] if world_size == 1 else torchrun(world_size, *program)
            run(launched, cwd=REPOSITORY, timeout=500)
            for run_folder in filter(Path.is_dir, (folder / "out").iterdir()):
                shutil.rmtree(run_folder)  # hundreds of megabytes of checkpoints

        out = once(tmp_path_factory, f"ranks-{world_size}", make) / "out"
        return [json.loads((out / f"rank-{rank}.json").read_text()) for rank in range(world_size)]

    return results
