"""The model file of the best epoch: when it is written, and how it is repaired."""

import dataclasses

import pytest

from regraft.contract import EVALUATION, MODEL
from tests.trainer.checkpoint.managed import AVERAGE, EVERY_EPOCH, NEVER, Make
from tests.trainer.runs import printed
from trainer.checkpoint import store
from trainer.checkpoint.retention import RetentionPolicy
from trainer.errors import UserError
from trainer.metrics import BestEpoch


@pytest.mark.parametrize(
    ("retention", "checkpoints"),
    [
        (dataclasses.replace(EVERY_EPOCH, keep_last=1), [[(2, 1)], [(4, 2)], [(6, 3), (4, 2)], [(8, 4), (4, 2)]]),
        (dataclasses.replace(NEVER, keep_best=True, keep_last=1), [[(2, 1)], [(4, 2)], [(4, 2)], [(8, 4), (4, 2)]]),
        (NEVER, [[], [], [], [(8, 4)]]),
    ],
)
def test_the_best_epoch_is_the_model_file_whatever_is_saved(
    retention: RetentionPolicy, checkpoints: list[list[tuple[int, int]]], make: Make
) -> None:
    training = make(retention)
    with training.manager:
        for epoch, accuracy in enumerate([0.5, 0.9, 0.7, 0.8], start=1):
            assert training.end_epoch(epoch, accuracy) is None
            training.saver.wait()
            assert training.checkpoints == checkpoints[epoch - 1]
            assert training.model_file() == (min(epoch, 2), min(epoch, 2))
    assert store.read(training.path(8, 4)).state.best == BestEpoch(epoch=2, step=4, value=0.9, loss=1.0)
    assert training.model_metrics() == {**training.log.epochs[1], "selected_on": "test"}


def test_another_metric_selects_the_best_epoch(make: Make) -> None:
    training = make(select_by="log_loss")
    (training.run.folder / EVALUATION).touch()
    with training.manager:
        for epoch, (accuracy, loss) in enumerate([(0.9, 1.0), (0.5, 0.5), (0.9, 0.7), (0.8, 0.6)], start=1):
            training.end_epoch(epoch, accuracy, loss=loss)
            training.saver.wait()
            assert training.model_file() == (min(epoch, 2), min(epoch, 2))
    assert training.state.best == BestEpoch(epoch=2, step=4, value=-0.5, loss=0.5)
    assert not (training.run.folder / EVALUATION).exists(), "it was of another model file"


def test_of_equal_accuracies_the_lower_loss_then_the_first_is_the_best(make: Make) -> None:
    training = make(split="val", epochs=6, epoch=1, step=2, best=BestEpoch(epoch=1, step=2, value=0.8, loss=1.0))
    with training.manager:
        for epoch, (accuracy, loss, best) in enumerate(
            [(0.7, 0.1, 1), (0.8, 1.0, 1), (0.8, 0.5, 4), (0.8, 0.5, 4), (0.8, 0.9, 4)], start=2
        ):
            training.end_epoch(epoch, accuracy, loss=loss, split="val")
            training.saver.wait()
            assert training.state.best is not None
            assert training.state.best.epoch == best
            assert (training.run.folder / MODEL).exists() == (epoch >= 4), "a worse epoch does not replace it"
    assert training.model_metrics()["selected_on"] == "val"


# --- repair


def test_a_model_of_a_lost_epoch_is_restored_from_the_best_checkpoint(make: Make) -> None:
    killed = make(ema=True)
    with killed.manager:
        killed.end_epoch(1, 0.5)
        best = killed.state.best
        killed.end_epoch(2, 0.9)  # its model file was written, its checkpoint not
    training = make(ema=True, epoch=1, step=2, best=best)
    training.log.epochs = killed.log.epochs[:1]
    training.manager.repair_best_model()
    assert training.model_file() == (AVERAGE, 1)
    line = f"{MODEL} was not of the best epoch (1): restored from its checkpoint\n"
    assert printed(training.run) == line
    training.manager.repair_best_model()
    assert printed(training.run) == line, "it is, now"
    (training.run.folder / MODEL).write_bytes(b"damaged")
    training.manager.repair_best_model()
    assert training.model_file() == (AVERAGE, 1)


def test_without_the_best_checkpoint_the_best_epoch_is_selected_anew_or_its_loss_reported(make: Make) -> None:
    killed = make()
    with killed.manager:
        killed.end_epoch(2, 0.9)
    best = BestEpoch(epoch=1, step=2, value=0.5, loss=1.0)
    training = make(epoch=1, step=2, best=best)
    training.manager.repair_best_model()
    assert training.state.best is None
    assert "the best epoch is selected anew" in printed(training.run)
    (training.run.folder / MODEL).unlink()
    with pytest.raises(UserError, match=r"model\.safetensors of the best epoch \(1\) is gone"):
        make(epoch=1, step=2, best=best).manager.repair_best_model()
