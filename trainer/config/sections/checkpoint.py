"""Section `checkpoint`: checkpoint interval, retention and selection of the best epoch."""

from dataclasses import dataclass
from typing import Literal

from trainer.config.sections.values import check_value
from trainer.optim.schedule import parse_interval


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """Checkpoint interval, retention and selection of the best epoch."""

    every: str | None = "1 epoch"
    """Checkpoint interval: '100 steps', '1 epoch', '10%', '10 min' or '2 h'; null saves only at the end, when stopped and at best epochs."""
    keep_last: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = True
    """Best epoch: save a checkpoint at each new best epoch, and keep that of the best."""
    select_by: Literal["accuracy", "balanced_accuracy", "f1_macro", "log_loss"] = "accuracy"
    """Metric that selects the best epoch on the validation split, and counts for early stopping; ties go to the lower log loss."""
    keep_every: str | None = None
    """Permanent checkpoints: keep those at multiples of '10 epochs' or '1000 steps'; null keeps none permanently."""

    def __post_init__(self) -> None:
        check_value("checkpoint.keep_last", self.keep_last, self.keep_last >= 1, "1 or more")
        if self.every is not None:
            parse_interval("checkpoint.every", self.every)
        if self.keep_every is not None:
            interval = parse_interval("checkpoint.keep_every", self.keep_every)
            expected = "steps, epochs or a percentage, not a time"
            check_value("checkpoint.keep_every", repr(self.keep_every), interval.training is not None, expected)
