import dataclasses

import pytest

from trainer.config import Config, DataConfig


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().debug = True  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().root = "x"  # type: ignore[misc]
