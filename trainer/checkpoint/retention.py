"""When a checkpoint is due, and which are kept: pure functions."""

from collections.abc import Sequence
from dataclasses import dataclass

from trainer.checkpoint.state import CheckpointId


@dataclass(frozen=True, kw_only=True)
class RetentionPolicy:
    """What the config asks for, in steps of the run and in seconds."""

    every_steps: int | None
    every_seconds: float | None
    keep_last: int
    keep_best: bool
    keep_every: int | None
    """In steps."""

    def should_save(self, step: int, seconds: float) -> bool:
        """Return whether to save after `step` updates, `seconds` after the last checkpoint."""
        by_step = self.every_steps is not None and step % self.every_steps == 0
        return by_step or (self.every_seconds is not None and seconds >= self.every_seconds)

    def to_keep(self, places: Sequence[CheckpointId], best: CheckpointId | None) -> set[CheckpointId]:
        """Return which of the checkpoints are kept.

        Args:
            places: of all there are.
            best: where the best epoch so far was saved, if it was.

        """
        newest = sorted(places, reverse=True)[: self.keep_last]
        ends = {place.step: place for place in sorted(places)}  # of one step, that after its evaluation
        milestones = [
            place for step, place in ends.items() if self.keep_every and step % self.keep_every == 0
        ]
        return {*newest, *milestones, *([best] if best is not None and self.keep_best else [])}
