"""What a run tells of itself: console, metrics and curves, in one listener of the loop."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.loop import Evaluations, Progress
from trainer.report.console import Display, peak_memory
from trainer.report.figures import draw_curves
from trainer.report.metrics import MetricsFile, epoch_row, read_rows, train_row
from trainer.run_folder import CURVES, METRICS

_SECONDS_BETWEEN_FIGURES = 20.0  # short epochs are not slowed down by their own picture


class RunReport:
    """Rank 0's listener: shows, writes, draws."""

    def __init__(
        self, display: Display, *, folder: Path, title: str, device: torch.device, done_epochs: int
    ) -> None:
        self._display = display
        with _said(folder):
            self._metrics = MetricsFile(folder / METRICS, keep_epochs=done_epochs)
        self._folder, self._title, self._device = folder, title, device
        self._drawn = 0.0

    def step(self, epoch: int, epoch_step: int) -> None:
        """Move the progress bar."""
        self._display.step(epoch, epoch_step)

    def point(self, progress: Progress) -> None:
        """Show and write the figures of a point."""
        self._display.point(progress)
        with _said(self._folder):
            self._metrics.append(train_row(progress, self._display.steps_per_epoch))

    def epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Show and write an epoch, and draw the curves anew."""
        row = epoch_row(progress, evaluations, peak_memory(self._device))
        with _said(self._folder):
            self._metrics.append(row)
        self._display.epoch(row, tuple(evaluations))
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_FIGURES:
            self.draw()

    def draw(self) -> None:
        """Draw the curves of all rows so far."""
        self._drawn = time.monotonic()
        with _said(self._folder):
            draw_curves(read_rows(self._metrics.path), self._folder / CURVES, title=self._title)


@contextmanager
def _said(folder: Path) -> Iterator[None]:
    """Turn a full disk, or a folder that is gone, into one sentence."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{folder}: the figures could not be written ({error.strerror or error}). What was saved before is whole: "
            "make room, and the same command goes on from there"
        ) from None


class Silent:
    """The other ranks' listener."""

    def step(self, epoch: int, epoch_step: int) -> None:
        """Say nothing."""

    def point(self, progress: Progress) -> None:
        """Say nothing."""

    def epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Say nothing."""

    def draw(self) -> None:
        """Draw nothing."""
