"""Early stopping as a function of metrics."""

from typing import Any

import pytest

from trainer.checkpoint.early_stopping import should_stop_early


def rows(*accuracies: float, losses: dict[int, float] | None = None) -> list[dict[str, Any]]:
    losses = losses or {}
    return [
        {
            "epoch": epoch,
            "val_accuracy": accuracy,
            "val_loss": losses.get(epoch, 1.0),
            "test_accuracy": 0.1 * epoch,
        }
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]


@pytest.mark.parametrize(
    ("accuracies", "patience", "over"),
    [
        ([], 1, False),
        ([0.5], 1, False),
        ([0.5, 0.6], 1, False),
        ([0.6, 0.5], 1, True),
        ([0.6, 0.5], 2, False),
        ([0.6, 0.5, 0.4], 2, True),
        ([0.6, 0.5, 0.6], 2, True),
        ([0.6, 0.5, 0.7], 2, False),
        ([0.6, 0.5, 0.7, 0.6, 0.6], 3, False),
        ([0.6, 0.5, 0.7, 0.6, 0.6, 0.6], 3, True),
    ],
)
def test_a_run_is_over_when_none_of_the_last_epochs_was_better(
    accuracies: list[float], patience: int, over: bool
) -> None:
    assert should_stop_early(rows(*accuracies), part="val", patience=patience) is over


def test_an_equal_accuracy_at_a_lower_loss_is_better_as_in_the_selection() -> None:
    assert not should_stop_early(rows(0.6, 0.6, losses={2: 0.9}), part="val", patience=1)
    assert should_stop_early(rows(0.6, 0.6, losses={2: 1.1}), part="val", patience=1)
    assert should_stop_early(rows(0.6, 0.6), part="val", patience=1), "of equals the first is the best"
