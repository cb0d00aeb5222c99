import pytest

from trainer.checkpoint.early_stopping import EarlyStopping


@pytest.mark.parametrize(
    ("accuracies", "losses", "patience", "stops"),
    [
        ([], {}, 1, False),
        ([0.6, 0.5], {}, 1, True),
        ([0.6, 0.5], {}, None, False),
        ([0.6, 0.5, 0.7, 0.6, 0.6], {}, 3, False),
        ([0.6, 0.5, 0.7, 0.6, 0.6, 0.6], {}, 3, True),
        ([0.6, 0.6], {2: 0.9}, 1, False),  # an equal accuracy at a lower loss is better
        ([0.6, 0.6], {2: 1.1}, 1, True),
    ],
)
def test_a_run_stops_after_patience_epochs_without_a_better_one(
    accuracies: list[float], losses: dict[int, float], patience: int | None, stops: bool
) -> None:
    epochs = [
        {"epoch": epoch, "val_accuracy": accuracy, "val_loss": losses.get(epoch, 1.0), "test_accuracy": epoch}
        for epoch, accuracy in enumerate(accuracies, start=1)
    ]
    assert EarlyStopping(split="val", patience=patience).should_stop(epochs) is stops
    if not losses:
        by_loss = [{"epoch": row["epoch"], "val_loss": -row["val_accuracy"]} for row in epochs]
        assert EarlyStopping(split="val", patience=patience, select_by="log_loss").should_stop(by_loss) is stops
    assert not EarlyStopping(split=None, patience=patience).should_stop(epochs)
