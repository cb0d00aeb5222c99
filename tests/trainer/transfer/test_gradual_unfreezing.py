import itertools
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.folders import image_folder
from tests.trainer.test_train_run import back_to, equal, train
from trainer.checkpoint import store
from trainer.checkpoint.store import CheckpointId
from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.pipeline import resolve
from trainer.run.folder import CHECKPOINTS

STAGES = {0: "head", 1: "layer4", 2: "layer1"}
"""By epoch, of three epochs of two steps."""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    home = tmp_path_factory.mktemp("staged")
    threads = torch.get_num_threads()
    root = image_folder(home / "images", {"train": {"a": 4, "b": 3}, "test": {"a": 1, "b": 1}})
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu"),
            data=DataConfig(root=str(root), image_size=32, num_workers=0, cache=str(home / "cache")),
            model=ModelConfig(name="resnet18", weights=None),
            transfer=TransferConfig(trainable=STAGES),
            optim=OptimConfig(name="adamw", lr=1e-3, weight_decay=0.1),
            train=TrainConfig(epochs=3, batch_size=4, precision="fp32"),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    _, seen = train(config)
    assert "from epoch 2 on, 8,394,754 parameters train" in " ".join(seen.split())
    yield config
    torch.set_num_threads(threads)


def at(config: Config, step: int, epoch: int, file: str = store.MODEL) -> dict[str, torch.Tensor]:
    return load_file(Path(config.run.dir) / CHECKPOINTS / CheckpointId(step, epoch).name / file)


def parts(names: set[str]) -> set[str]:
    return {name.split(".")[0] for name in names}


def test_each_stage_moves_its_own_and_what_came_before_and_nothing_else(finished: Config) -> None:
    places = [(1, 0), (2, 1), (4, 2), (6, 3)]
    states = [at(finished, *place) for place in places]
    changed = [
        {name for name in after if not torch.equal(before[name], after[name])}
        for before, after in itertools.pairwise(states)
    ]
    assert [parts(names) for names in changed] == [{"fc"}, {"layer4", "fc"}, {"layer1", "layer4", "fc"}]
    # Neither did BatchNorm drift below: every parameter and statistic of the other parts is as it was.
    moments = [at(finished, *place, store.OPTIMIZER) for place in places]
    assert [parts({name.split(".", 1)[1] for name in found}) for found in moments] == [
        {"fc"}, {"fc"}, {"layer4", "fc"}, {"layer1", "layer4", "fc"},
    ]  # fmt: skip
    assert not torch.equal(states[1]["layer4.0.bn1.running_mean"], states[2]["layer4.0.bn1.running_mean"])


@pytest.mark.slow
@pytest.mark.parametrize("place", [(2, 1), (3, 1), (5, 2)], ids=str)
def test_a_run_resumes_in_any_stage_and_ends_the_same(
    place: tuple[int, int], finished: Config, tmp_path: Path
) -> None:
    shutil.copytree(finished.run.dir, tmp_path / "run")
    copy = replace(finished, run=replace(finished.run, dir=str(tmp_path / "run")))
    back_to(copy, *place)
    train(copy)
    assert equal(copy, finished)
