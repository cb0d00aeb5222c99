"""What trains x where the output layer starts, on real architectures: what is to move moves, from where it should."""

import io
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision import models

from tests.folders import image_folder
from trainer.config.builders import load_dataset, make_preprocessing
from trainer.config.model_builder import fit_linear_probe, make_model, make_param_groups
from trainer.config.schema import Config, DataConfig, ModelConfig, OptimConfig, TransferConfig
from trainer.distributed import context
from trainer.loop import update
from trainer.model.freeze import apply_stage
from trainer.optim.param_groups import make_optimizer
from trainer.pipeline import resolve

CLASSES = {"ants": 3, "bees": 3, "wasps": 2}
ANT, BEE = 310, 309
HEADS = {"resnet18": "fc", "squeezenet1_1": "classifier.1"}
LAST_2 = {"resnet18": ("layer4", "fc"), "squeezenet1_1": ("features.12", "classifier")}
TRAINS: list[tuple[Any, dict[str, tuple[str, ...]]]] = [
    ("all", dict.fromkeys(HEADS, ("",))),
    ("head", {name: (head,) for name, head in HEADS.items()}),
    ({0: "head", 1: "last:2"}, LAST_2),
]


@pytest.fixture(scope="module", params=list(HEADS))
def source(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, Path]:
    """Return (architecture, its source weights, images)."""
    home = tmp_path_factory.mktemp(request.param)
    torch.manual_seed(5)
    model = models.get_model(request.param)
    for layer in model.modules():
        if isinstance(layer, nn.BatchNorm2d):
            nn.init.uniform_(layer.running_mean, -0.1, 0.1)
    save_file(model.state_dict(), home / "source.safetensors")
    root = image_folder(home / "images", {"train": CLASSES, "test": {"ants": 1, "bees": 1, "wasps": 1}})
    return request.param, home / "source.safetensors", root


def changed(before: dict[str, Tensor], after: dict[str, Tensor]) -> set[str]:
    return {name for name in before if not torch.equal(before[name], after[name])}


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.slow
@pytest.mark.parametrize("init", ["xavier", "torch", "source-labels", "linear-probe"])
@pytest.mark.parametrize(
    ("trains", "moving"), TRAINS, ids=lambda value: str(value) if isinstance(value, str) else ""
)
def test_what_trains_and_where_the_head_starts_combine(
    init: Any, trains: Any, moving: dict[str, tuple[str, ...]], source: tuple[str, Path, Path], tmp_path: Path
) -> None:
    name, weights, root = source
    head = HEADS[name]
    threads = torch.get_num_threads()
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    console = Console(file=io.StringIO())
    config = resolve(
        Config(
            data=DataConfig(root=str(root), image_size=64, num_workers=0, cache=str(tmp_path)),
            model=ModelConfig(name=name, weights=str(weights), head_init=init),
            transfer=TransferConfig(trainable=trains),
            optim=OptimConfig(lr=0.01, momentum=0.0),
        )
    )
    index = load_dataset(config.data, ctx, console).index
    created = make_model(config, index.classes, config.model.weights, on_progress=console.print)
    if init == "linear-probe":
        fit_linear_probe(
            created,
            index,
            make_preprocessing(config.data),
            config,
            ctx,
            watch=nullcontext,
            log=console.print,
        )
    model, start = created.model, copied(created.model)

    # Where the head starts; the rest is the source's, whatever the head.
    given = load_file(weights)
    rows, bias = start[f"{head}.weight"], start[f"{head}.bias"]
    drawn = replace(config, model=replace(config.model, head_init="xavier"))
    xavier = make_model(drawn, index.classes, str(weights), on_progress=console.print).model.state_dict()
    assert {one for one in changed(start, xavier) if not one.startswith(head)} == set()
    assert all(torch.equal(start[one], given[one]) for one in start if not one.startswith(head))
    assert torch.equal(rows, xavier[f"{head}.weight"]) == (init == "xavier")
    if init == "source-labels":
        theirs = given[f"{head}.weight"] - given[f"{head}.weight"].mean(0)
        torch.testing.assert_close(rows[:2], theirs[[ANT, BEE]])
        torch.testing.assert_close(bias[2], torch.tensor(998.0).log())
    if init == "linear-probe":
        assert rows.sum(0).abs().max() < 1e-3 * rows.abs().max(), "the penalty leaves no part common to all"

    # What moves in an update, in the last of the stages.
    groups = make_param_groups(created, config)
    optimizer = make_optimizer("sgd", groups, momentum=0.0)
    model, optimizer = context.prepare(ctx.accelerator, model, optimizer)
    images = torch.randint(0, 255, (6, 3, 64, 64), dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 0, 1, 2])
    for stage in created.unfreeze_stages:
        apply_stage(model, stage, config.transfer.batch_norm)
        model.train()
        before = copied(model)
        update(
            model, optimizer, (images, labels, labels), 1 / 6,
            accelerator=ctx.accelerator, normalize=lambda batch: batch.float() / 128 - 1, parts=1, max_grad_norm=None,
        )  # fmt: skip
        moved = changed(before, copied(model))
        at = (head,) if stage is created.unfreeze_stages[0] and isinstance(trains, dict) else moving[name]
        assert moved, "something trains"
        assert all(one.startswith(at) for one in moved)
        assert stage.trainable <= moved, "all that is to train does"
    torch.set_num_threads(threads)
