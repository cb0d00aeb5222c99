"""Retention: when a checkpoint is due, and which checkpoints are kept. Pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.checkpoint.state import CheckpointId


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """The options of section `checkpoint`, in steps and seconds."""

    every_steps: int | None
    """Save every this many steps of the run."""
    every_seconds: float | None
    """Save this many seconds after the last checkpoint."""
    keep_last: int
    """Number of newest checkpoints to keep."""
    keep_best: bool
    """Whether to keep the checkpoint of the best epoch."""
    keep_every: int | None
    """Keep the checkpoints at multiples of this many steps."""

    def should_save(self, step: int, seconds: float) -> bool:
        """Return whether to save after `step` updates, `seconds` after the last checkpoint."""
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or (self.every_seconds is not None and seconds >= self.every_seconds)

    def to_keep(self, checkpoints: Sequence[CheckpointId], best: CheckpointId | None) -> set[CheckpointId]:
        """Return the checkpoints to keep.

        Args:
            checkpoints: all checkpoints of the run.
            best: the checkpoint of the best epoch so far. It need not exist.

        """
        newest = sorted(checkpoints, reverse=True)[: self.keep_last]
        # Of two checkpoints at the same step, the one after the evaluation.
        by_step = {checkpoint.step: checkpoint for checkpoint in sorted(checkpoints)}
        milestones = [
            checkpoint for step, checkpoint in by_step.items() if self.keep_every and step % self.keep_every == 0
        ]
        return {*newest, *milestones, *([best] if best is not None and self.keep_best else [])}
