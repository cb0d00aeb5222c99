import dataclasses
from typing import Any

import pytest

from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    PretrainConfig,
    RegularizationConfig,
    TrainConfig,
    TransferConfig,
)
from trainer.errors import UserError


def test_a_config_cannot_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().debug = True  # type: ignore[misc]
    with pytest.raises(dataclasses.FrozenInstanceError):
        DataConfig().root = "x"  # type: ignore[misc]


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"every": None, "keep_best": False, "keep_last": 1},
        {"every": "10 min", "keep_every": "10 epochs"},
        {"every": "3 steps", "keep_every": "25%"},
    ],
)
def test_checkpoints_may_come_by_training_or_by_the_clock(given: dict[str, Any]) -> None:
    CheckpointConfig(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"every": "often"}, r"checkpoint\.every is 'often': expected an interval"),
        ({"every": "0 steps"}, r"checkpoint\.every is '0 steps': expected more than nothing"),
        ({"keep_every": "now and then"}, r"checkpoint\.keep_every is 'now and then': expected an interval"),
        (
            {"keep_every": "10 min"},
            r"checkpoint\.keep_every is '10 min': expected steps, epochs or a percentage",
        ),
        ({"keep_last": 0}, r"checkpoint\.keep_last is 0: expected 1 or more"),
        ({"keep_last": -1, "every": None}, r"checkpoint\.keep_last is -1"),
    ],
)
def test_a_checkpoint_rule_that_cannot_be_kept_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        CheckpointConfig(**given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {
                "data": DataConfig(sampling="balanced"),
                "regularization": RegularizationConfig(class_weights="balanced"),
            },
            r"data\.sampling and regularise\.class_weights are both balanced",
        ),
        (
            {"regularization": RegularizationConfig(mixup=0.2), "train": TrainConfig(batch_size=1)},
            r"regularise\.mixup and cutmix mix .* train\.batch_size is 1",
        ),
        (
            {"regularization": RegularizationConfig(cutmix=1.0), "train": TrainConfig(batch_size=1)},
            r"regularise\.mixup and cutmix mix .* train\.batch_size is 1",
        ),
    ],
)
def test_regularisers_that_do_not_go_together_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Config(**given)
    for section in given.items():
        Config(**dict([section]))


@pytest.mark.parametrize(
    ("section", "given", "said"),
    [
        (
            RegularizationConfig,
            {"label_smoothing": 1.0},
            r"regularise\.label_smoothing is 1\.0: expected 0 to",
        ),
        (RegularizationConfig, {"label_smoothing": float("nan")}, r"regularise\.label_smoothing is nan"),
        (RegularizationConfig, {"mixup": -0.1}, r"regularise\.mixup is -0\.1: expected 0 or more"),
        (RegularizationConfig, {"cutmix": float("inf")}, r"regularise\.cutmix is inf: expected 0 or more"),
        (DataConfig, {"random_erasing": 1.1}, r"data\.random_erasing is 1\.1: expected a probability"),
    ],
)
def test_a_regulariser_out_of_its_range_is_refused(section: Any, given: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        section(**given)


@pytest.mark.parametrize("given", [{"l2_sp": 0.1}, {"wise_ft": True}])
def test_what_leads_back_to_a_source_needs_one(given: dict[str, Any]) -> None:
    transfer = TransferConfig(**given)
    Config(transfer=transfer)
    Config(transfer=transfer, model=ModelConfig(weights=None), pretrain=PretrainConfig(root="images"))
    with pytest.raises(
        UserError, match=r"transfer\.(l2_sp is 0\.1|wise_ft is True), which leads back to a source"
    ):
        Config(transfer=transfer, model=ModelConfig(weights=None))
