"""When an export counts as equal to the original."""

from pathlib import Path

import pytest
import torch

from tests.folders import image_folder
from trainer.commands.verification_data import read_verification_data
from trainer.export.verification import _compare

LOGITS = torch.tensor([[5.0, -5.0], [-5.0, 5.0], [0.1, 0.0]]).repeat(100, 1)
LABELS = LOGITS.argmax(1)


@pytest.mark.parametrize(
    ("exported", "tolerance", "succeeded", "changed"),
    [
        (LOGITS + 4e-4, 1e-4, True, 0),  # 1e-4 of the largest logit, 5
        (LOGITS + 6e-4, 1e-4, False, 0),
        (LOGITS.roll(1, 1), 1e-4, False, 300),
        (torch.full_like(LOGITS, torch.nan), 1e-4, False, 200),
        (LOGITS + torch.tensor([0.0, 0.09]), 2e-2, True, 0),
        # Two logits that are equal within the limit may change places.
        (LOGITS + torch.tensor([0.0, 0.1001]), 2.1e-2, True, 100),
        # One image with clearly another class is enough, though all logits are within the limit.
        (LOGITS + torch.tensor([[-0.06, 0.06]]) * (torch.arange(300) == 2)[:, None], 1.9e-2, False, 1),
    ],
)
def test_an_export_is_equal_if_its_logits_and_its_clear_predictions_are(
    exported: torch.Tensor, tolerance: float, succeeded: bool, changed: int
) -> None:
    verification = _compare(LOGITS, exported, LABELS, unreadable=0, tolerance=tolerance)
    assert verification.succeeded is succeeded
    assert verification.correct == verification.images == 300
    if not torch.isnan(exported).any():
        assert verification.changed == changed


@pytest.mark.parametrize(("count", "expected"), [(6, [0, 0, 0, 1, 1, 1]), (3, [0, 0, 1]), (99, [0] * 5 + [1] * 5)])
def test_the_images_are_spread_over_the_classes(count: int, expected: list[int], tmp_path: Path) -> None:
    data = image_folder(tmp_path, {"train": {"a": 1, "b": 1}, "test": {"a": 5, "b": 5}})
    examples = read_verification_data(str(data), tmp_path, ["a", "b"], count=count).examples
    assert [example.label for example in examples] == expected
