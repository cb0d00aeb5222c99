"""Model files and images of the tests of this folder."""

from pathlib import Path
from typing import Any

import torch

from tests.folders import noise_image
from trainer.data.preprocessing import Preprocessing
from trainer.model.create import build_model
from trainer.model.metadata import ModelMetadata, write_model

CLASSES = ("ant", "bee", "it, is\n'quoted'", "猫")


def write_model_file(path: Path, architecture: str = "shufflenet_v2_x0_5", **changes: Any) -> Path:
    """Write a model file with random weights whose answers differ from image to image."""
    torch.manual_seed(3)
    classes = changes.get("classes", CLASSES)
    model = build_model(architecture, image_size=64, num_classes=len(classes), weights=None, head_init="torch").model
    model.train()
    with torch.no_grad():
        for _ in range(20):  # realistic BatchNorm statistics
            model(torch.randn(4, 3, 64, 64) + torch.randn(4, 3, 1, 1))
    fields: dict[str, Any] = {
        "version": "0.1.0",
        "architecture": architecture,
        "classes": classes,
        "preprocessing": Preprocessing(
            image_size=64,
            resize_size=72,
            resize="shorter",
            interpolation="bicubic",
            mean=(0.485, 0.456, 0.406),
            std=(0.229, 0.224, 0.225),
        ),
        "source": "from scratch",
        "metrics": {"epoch": 1},
    }
    write_model(path, model.state_dict(), ModelMetadata(**fields | changes))
    return path


def write_images(folder: Path, count: int) -> list[Path]:
    """Write images of different sizes; return their paths in the order of their names."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.{'jpg' if number % 2 else 'png'}" for number in range(count)]
    for number, path in enumerate(paths):
        noise_image(number).resize((80 + 7 * (number % 5), 90)).save(path)
    return paths
