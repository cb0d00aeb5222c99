"""How much the logits of an fp16 export differ: the table in docs/measurements.md. `pytest -m soak -s` prints it."""

import dataclasses
from pathlib import Path

import pytest
import torch

from trainer.data.augment import Preprocessing
from trainer.export.onnx_model import export_onnx
from trainer.export.verification import FP16_TOLERANCE, verify
from trainer.model.build import preset
from trainer.model.create import build_model
from trainer.model.file import LoadedModel
from trainer.model.images import Preprocess
from trainer.model.metadata import ModelMetadata
from trainer.model.source_classes import ClassMapping

CLASSES = ("ants", "bees")
PRETRAINED = {
    "squeezenet1_1": "squeezenet1_1-imagenet1k-fp16.safetensors",
    "timm/tf_efficientnet_lite0": "tf_efficientnet_lite0-imagenet1k-fp16.safetensors",
}
TRAINED = (
    "resnet18", "resnet50", "mobilenet_v3_small", "efficientnet_b0", "shufflenet_v2_x1_0", "regnet_y_400mf",
    "timm/convnext_atto", "timm/vit_tiny_patch16_224",
)  # fmt: skip
"""Trained for a few steps from random weights, at a small size."""
_SIZE, _STEPS, _BATCH = 64, 80, 16


@pytest.mark.soak
@pytest.mark.shared
@pytest.mark.parametrize("architecture", [*PRETRAINED, *TRAINED])
def test_the_logits_of_an_fp16_export_differ_by_less_than_the_limit(
    architecture: str, shared: Path, tmp_path: Path
) -> None:
    folder = shared / "data" / "hymenoptera" / "train"
    examples = [(str(path), n) for n, name in enumerate(CLASSES) for path in sorted((folder / name).glob("*.jpg"))[:32]]
    file = PRETRAINED.get(architecture)
    loaded = build(architecture, None if file is None else shared / "weights" / file)
    if file is None:
        train(loaded, examples)
    run_exported = export_onnx(loaded, tmp_path / "model.onnx", fp16=True)
    result = verify(loaded, run_exported, examples, tolerance=FP16_TOLERANCE)  # raises if it is exceeded
    largest = result.limit / FP16_TOLERANCE
    weights = "trained at 64 px" if file is None else "ImageNet"
    print(
        f"\n| `{architecture}` | {weights} | {largest:.1f} | {result.difference / largest:.1e} | {result.changed} |",
        flush=True,
    )


def build(architecture: str, weights: Path | None) -> LoadedModel:
    torch.manual_seed(0)
    published = Preprocessing(**dataclasses.asdict(preset(architecture, None)))
    small = dataclasses.replace(published, image_size=_SIZE, resize_size=_SIZE)
    preprocessing = small if weights is None else published
    built = build_model(
        architecture, image_size=preprocessing.image_size, num_classes=len(CLASSES),
        weights=None if weights is None else str(weights), head_init="torch" if weights is None else "source-labels",
        class_mapping=ClassMapping(targets=CLASSES, aliases={}),
    )  # fmt: skip
    metadata = ModelMetadata(
        version="0", architecture=architecture, classes=CLASSES, preprocessing=preprocessing, source="", metrics={}
    )
    return LoadedModel(built.model.eval(), built.heads, metadata)


def train(loaded: LoadedModel, examples: list[tuple[str, int]]) -> None:
    images = Preprocess(loaded.metadata.preprocessing)([path for path, _ in examples])
    labels = torch.tensor([label for _, label in examples])
    optimizer = torch.optim.AdamW(loaded.module.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    loaded.module.train()
    for _ in range(_STEPS):
        batch = torch.randperm(len(examples), generator=generator)[:_BATCH]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(loaded.module(images[batch]), labels[batch]).backward()
        optimizer.step()
    loaded.module.eval()
