"""The loop against a plain implementation of the note's recipe: the same losses, on 1, 2 and 3 real processes.

The reference is written from the recipe alone: torchvision's transforms, cross-entropy, autograd and an SGD
spelt out by hand. It takes from the project the order of the examples and the model that training starts from.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn
from torchvision import models, transforms

from tests.folders import image_folder
from tests.launching import MAIN, run, step_losses, torchrun
from trainer.data.loader import EpochOrder
from trainer.model.create import build_model
from trainer.seeds import derive_seed

# 22 = 3 x 7 + 1: the last batch is ragged, and of one example, so that two of three processes have none of it.
BATCH, EPOCHS, SEED = 7, 2, 3
LR, HEAD_SCALE, DECAY = {"sum": 2e-4, "mean": 2e-3}, 10.0, 1e-3
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    parts = {"train": {"a": 9, "b": 7, "c": 6}, "test": {"a": 3, "b": 2, "c": 2}}
    return image_folder(tmp_path_factory.mktemp("data"), parts)


def recipe(
    model: nn.Module, head: Sequence[nn.Parameter], examples: Sequence[tuple[str, int]], reduction: str
) -> Iterator[float]:
    """Train as the note does, and yield each batch's mean loss before its update."""
    preprocess = transforms.Compose(
        [
            transforms.Resize([36, 36]),
            transforms.CenterCrop(32),
            transforms.ToTensor(),
            transforms.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        ]
    )
    images = torch.stack([preprocess(Image.open(path).convert("RGB")) for path, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    order = EpochOrder(examples=len(examples), batch_size=BATCH, seed=SEED)
    in_head = {id(p) for p in head}
    for epoch in range(EPOCHS):
        for batch in order.permutation(epoch).split(BATCH):
            losses = nn.functional.cross_entropy(model(images[batch]), labels[batch], reduction="none")
            yield losses.mean().item()
            (losses.sum() if reduction == "sum" else losses.mean()).backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    lr = LR[reduction] * (HEAD_SCALE if id(parameter) in in_head else 1)
                    parameter.sub_(lr * (parameter.grad + DECAY * parameter))
                    parameter.grad = None


def join_truncated(folder: Path) -> list[tuple[str, int]]:
    return [
        (str(path), label)
        for label, name in enumerate("abc")
        for path in sorted((folder / "train" / name).iterdir())
    ]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pretrained ResNet-18 of sorts: its BatchNorm statistics are not those of a new one."""
    torch.manual_seed(11)
    model = models.resnet18()
    with torch.no_grad():
        for _ in range(20):
            model(torch.randn(16, 3, 32, 32))
    path = tmp_path_factory.mktemp("weights") / "source.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    return path


@pytest.fixture(scope="module")
def resnet_reference(folder: Path, weights: Path) -> dict[str, list[float]]:
    def losses(reduction: str) -> list[float]:
        torch.manual_seed(derive_seed("weights", SEED))
        created = build_model(
            "resnet18",
            image_size=32,
            num_classes=3,
            weights=str(weights),
            head_init="xavier",
        )
        model = created.model.eval()  # frozen BatchNorm is BatchNorm in eval mode; there is no dropout
        head = list(model.get_submodule(created.heads[0]).parameters())
        return list(recipe(model, head, join_truncated(folder), reduction))

    return {reduction: losses(reduction) for reduction in ("sum", "mean")}


@pytest.mark.slow
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_whole_program_follows_the_recipe(
    processes: int,
    reduction: str,
    folder: Path,
    weights: Path,
    resnet_reference: dict[str, list[float]],
    tmp_path: Path,
) -> None:
    options = {
        "run.dir": tmp_path / "run",
        "run.seed": SEED,
        "run.threads": 1,
        "data.root": folder,
        "data.image_size": 32,
        "data.resize_size": 36,
        "data.augment": "none",
        "data.num_workers": 0,
        "model.name": "resnet18",
        "model.weights": weights,
        "transfer.batch_norm": "frozen",
        "optim.lr": LR[reduction],
        "optim.head_lr_scale": HEAD_SCALE,
        "optim.weight_decay": DECAY,
        "optim.momentum": 0,
        "optim.loss_reduction": reduction,
        "optim.schedule": "constant",
        "train.epochs": EPOCHS,
        "train.batch_size": BATCH,
        "train.logs_per_epoch": 100,
        "train.precision": "fp32",
    }
    arguments = [f"--{key}={value}" for key, value in options.items()]
    run(torchrun(processes, MAIN, *arguments), cwd=tmp_path, environment={"ACCELERATE_USE_CPU": "true"})
    assert step_losses(tmp_path / "run") == pytest.approx(resnet_reference[reduction], rel=TOLERANCE)


class Plain(nn.Module):
    """A model without BatchNorm and without dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, stride=2), nn.GELU(), nn.Conv2d(8, 16, 3, stride=2), nn.GELU()
        )
        self.last = nn.Linear(16, 3)

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.body(images)
        return self.last(features.mean(dim=(2, 3)))  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2, 3])
def test_the_loop_follows_the_recipe_on_a_model_without_batch_norm(
    processes: int, folder: Path, tmp_path: Path
) -> None:
    worker = Path(__file__).with_name("fit_plain.py")
    out = tmp_path / "losses.json"
    program = [worker, "--folder", folder, "--out", out]
    run(torchrun(processes, *program), cwd=tmp_path)
    found = json.loads(out.read_text())
    for reduction in ("sum", "mean"):
        torch.manual_seed(SEED)
        model = Plain()
        reference = list(recipe(model, list(model.last.parameters()), join_truncated(folder), reduction))
        assert found[reduction] == pytest.approx(reference, rel=TOLERANCE)
        assert found[f"{reduction}, in two parts"] == pytest.approx(reference, rel=TOLERANCE)
