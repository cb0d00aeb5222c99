from pathlib import Path

import pytest

from tests.trainer.inference.models import write_images, write_model_file


@pytest.fixture(scope="session")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the file of a small model."""
    return write_model_file(tmp_path_factory.mktemp("model") / "model.safetensors")


@pytest.fixture(scope="session")
def image_paths(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return the paths of 21 images in one folder."""
    return write_images(tmp_path_factory.mktemp("pictures"), 21)
