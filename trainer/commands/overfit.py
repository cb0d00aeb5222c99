"""Overfit one batch: a model that cannot has a wrong learning rate, wrong labels or wrong inputs."""

from collections.abc import Iterator, Sequence

from torch import nn

from trainer.data.dataset import Batch
from trainer.optim.param_groups import set_lr
from trainer.optim.train_step import TrainStep
from trainer.state import TrainState

OVERFIT_STEPS = 20


def overfit(model: nn.Module, state: TrainState, train_step: TrainStep, batch: Batch) -> Iterator[float]:
    """Yield the mean cross-entropy of one batch before each of a few updates on it."""
    set_lr(state.optimizer, 1.0)
    size = len(batch.labels)
    for step in range(OVERFIT_STEPS):
        loss_sum, _ = train_step(model, state.optimizer, batch, step, size)
        yield loss_sum.item() / size


def describe_losses(losses: Sequence[float]) -> str:
    """Return a line that says whether the loss of the batch decreased."""
    change = f"loss {losses[0]:.4f} before the first update, {losses[-1]:.4f} before the last"
    if losses[-1] < 0.9 * losses[0]:
        return f"{change}: it decreases, so the model can overfit this batch"
    return (
        f"{change}: it does NOT decrease; check optim.lr (too small, or so large that it diverges), the labels, "
        "data.mean and data.std"
    )
