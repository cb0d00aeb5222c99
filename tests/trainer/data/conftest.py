"""Fixtures of the data tests."""

import pytest

from trainer.data.preprocessing import Preprocessing


@pytest.fixture(scope="session")
def preprocessing() -> Preprocessing:
    """Return a preprocessing for small images."""
    return Preprocessing(
        image_size=16, resize_size=18, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.5,) * 3
    )  # fmt: skip
