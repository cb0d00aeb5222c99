"""A small model, a dataset of its classes, and `regraft export`."""

from pathlib import Path

import pytest

from tests.trainer.inference.models import CLASSES, write_images, write_model_file


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a model of torchvision that timm has, too, with the same names of weights."""
    return write_model_file(tmp_path_factory.mktemp("export-model") / "model.safetensors", "resnet18")


@pytest.fixture(scope="session")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a dataset of the model's classes, 3 images of different sizes each."""
    root = tmp_path_factory.mktemp("export-data")
    for name in CLASSES:
        write_images(root / name, 3)
    return root


@pytest.fixture(scope="session")
def image_paths(dataset: Path) -> list[Path]:
    """Return the paths of five images."""
    return sorted(path for path in dataset.rglob("*") if path.is_file())[::2][:5]
