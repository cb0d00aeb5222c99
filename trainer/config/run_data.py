"""The data of a run: the checked examples, the order in which it trains on them, and the schedule of its updates."""

from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from trainer.config.resolve import ResolvedConfig
from trainer.data.image_cache.cached import NOT_CACHED, CachedImages
from trainer.data.index import DatasetIndex
from trainer.data.prepare import Prepared
from trainer.data.sampler import EpochOrder
from trainer.errors import UserError
from trainer.optim.schedule import TrainSchedule, get_lr_multiplier, warmup_steps


@dataclass(frozen=True, kw_only=True)
class RunData:
    """The examples of a run, their cached images, their order and the schedule of the updates."""

    prepared: Prepared
    order: EpochOrder
    schedule: TrainSchedule
    images: CachedImages = NOT_CACHED

    @property
    def index(self) -> DatasetIndex:
        """Return the examples of each split."""
        return self.prepared.index

    @property
    def train_groups(self) -> tuple[str | None, ...]:
        """Return the group of each training example, or nothing if there are no groups."""
        groups = self.index.groups
        return tuple(map(groups.get, self.index.train.paths)) if groups else ()

    @cached_property
    def examples_per_class(self) -> tuple[int, ...]:
        """Return the number of training examples of each class."""
        return tuple(np.bincount(self.index.train.labels, minlength=len(self.index.classes)).tolist())


def make_run_data(config: ResolvedConfig, prepared: Prepared, images: CachedImages = NOT_CACHED) -> RunData:
    """Return the data of a run; durations become steps here.

    Raises:
        UserError: the warm-up is longer than the run.

    """
    order = _make_epoch_order(config, prepared.index)
    return RunData(prepared=prepared, order=order, schedule=make_schedule(config, order), images=images)


def _make_epoch_order(config: ResolvedConfig, index: DatasetIndex) -> EpochOrder:
    """Return the order of the training examples."""
    is_balanced = config.data.sampling == "balanced"
    return EpochOrder(
        examples=len(index.train),
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        labels=tuple(index.train.labels.tolist()) if is_balanced else None,
    )


def make_schedule(config: ResolvedConfig, order: EpochOrder) -> TrainSchedule:
    """Return the schedule of the updates.

    Raises:
        UserError: the warm-up is longer than the run.

    """
    steps = order.steps_per_epoch
    total = steps * config.train.epochs
    warmup = warmup_steps(config.optim.warmup, steps_per_epoch=steps, total_steps=total)
    if warmup > total:
        raise UserError(
            f"optim.warmup is {config.optim.warmup!r}, {warmup} steps, but the run has {total}: the peak learning rate "
            "would not be reached"
        )
    return TrainSchedule(
        batch_sizes=order.batch_sizes,
        epochs=config.train.epochs,
        logs_per_epoch=config.train.logs_per_epoch,
        lr_multiplier=partial(get_lr_multiplier, total_steps=total, warmup_steps=warmup, kind=config.optim.schedule),
    )
