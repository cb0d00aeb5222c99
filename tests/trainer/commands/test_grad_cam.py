"""Grad-CAM: the layer with positions is found in each family of models, and the heat map is on what decides."""

import base64
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from trainer.commands import grad_cam
from trainer.commands.grad_cam import Explainer
from trainer.data.preprocessing import Preprocessing
from trainer.model.build import build
from trainer.model.file import LoadedModel
from trainer.model.head import find_heads
from trainer.model.metadata import ModelMetadata
from trainer.pages.run_files import PredictedImage

SIZE = 64


def load(name: str, module: nn.Module | None = None) -> LoadedModel:
    model = module or build(name, image_size=SIZE)
    heads = ("head",) if module is not None else tuple(head.name for head in find_heads(model, SIZE))
    normalization = Preprocessing(
        image_size=SIZE, resize_size=SIZE, resize="squash", interpolation="bilinear", mean=(0.0,) * 3, std=(1.0,) * 3
    )
    metadata = ModelMetadata(
        version="0",
        architecture="resnet18",
        classes=("left", "right"),
        preprocessing=normalization,
        source="",
        metrics={},
    )
    return LoadedModel(model.eval(), heads, metadata)


@pytest.mark.parametrize("name", ["resnet18", "timm/vit_tiny_patch16_224"])
def test_heat_maps_of_each_family_of_models(name: str) -> None:
    inputs = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    targets = [grad_cam.ClassifierOutputTarget(label) for label in (0, 1)]
    heat = grad_cam._make_cam(load(name))(inputs, targets)
    assert heat.shape == (2, SIZE, SIZE)
    assert 0 <= heat.min() <= heat.max() <= 1


class LeftAndRight(nn.Module):
    """Each class is the brightness of one half of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 2, 8, stride=8)
        nn.init.constant_(self.features.weight, 0.01)
        nn.init.zeros_(self.features.bias)
        self.head = nn.Linear(2, 2, bias=False)
        nn.init.eye_(self.head.weight)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        maps = self.features(images)
        half = maps.shape[3] // 2
        return self.head(torch.stack([maps[:, 0, :, :half].mean((1, 2)), maps[:, 1, :, half:].mean((1, 2))], 1))


def test_the_heat_is_where_the_image_is_bright_and_unreadable_images_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.zeros((SIZE, SIZE, 3), np.uint8)
    pixels[:, : SIZE // 2] = 255
    Image.fromarray(pixels).save(tmp_path / "left.png")
    monkeypatch.setattr(grad_cam, "load", lambda _: load("", LeftAndRight()))
    images = [PredictedImage(name, "test", "left", "left", 0.9, 0.9) for name in ("left.png", "missing.png")]
    overlays = Explainer(tmp_path, tmp_path)(images)
    assert overlays.keys() == {"left.png"}
    uri = overlays["left.png"].heatmap.partition(",")[2]
    drawn = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri))).convert("L"), np.float32)
    assert drawn[:, :24].mean() > drawn[:, 40:].mean() + 50
