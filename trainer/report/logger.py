"""What a run tells of itself: console, metrics and curves, in one listener of the loop."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from trainer.errors import UserError
from trainer.loop import Evaluations, Progress
from trainer.report.console import ProgressBar, peak_memory
from trainer.report.metrics import MetricsFile, Row, epoch_row, start_row, train_row
from trainer.run.folder import CURVES, METRICS

_SECONDS_BETWEEN_FIGURES = 20.0  # short epochs are not slowed down by their own picture


class RunLogger:
    """Rank 0's listener: shows, writes, draws.

    What cannot be written stands in `failure`: rank 0 alone knows of it, and all processes are to stop for it.
    """

    def __init__(
        self,
        progress_bar: ProgressBar,
        *,
        folder: Path,
        title: str,
        device: torch.device,
        text: str,
        check: Callable[[], None],
    ) -> None:
        """Begin with the metrics of a checkpoint (`text`), or with none.

        `check` raises a UserError where this process may no longer write.

        Raises:
            UserError: they cannot be written.

        """
        self.failure: UserError | None = None
        self._progress_bar = progress_bar
        self._folder, self._title, self._device = folder, title, device
        self._drawn = 0.0
        self._check = check
        with self._kept():
            self._metrics = MetricsFile(folder / METRICS, text)
        if self.failure is not None:  # before training all hear of it at once
            raise self.failure

    @property
    def rows(self) -> list[Row]:
        """Return the rows so far."""
        return self._metrics.rows

    @property
    def text(self) -> str:
        """Return the metrics file so far."""
        return self._metrics.text

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Show and write what the model is worth before the first step; its output layer took the seconds."""
        row = start_row(evaluations, seconds)
        with self._kept():
            self._metrics.append(row)
        self._progress_bar.print_start(row, tuple(evaluations))

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Move the progress bar."""
        self._progress_bar.advance(epoch, epoch_step)

    def log_step(self, progress: Progress) -> None:
        """Show and write the figures of a point."""
        self._progress_bar.show_metrics(progress)
        with self._kept():
            self._metrics.append(train_row(progress, self._progress_bar.steps_per_epoch))

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Show and write an epoch, and draw the curves anew."""
        row = epoch_row(progress, evaluations, peak_memory(self._device))
        with self._kept():
            self._metrics.append(row)
        self._progress_bar.print_epoch(row, tuple(evaluations))
        if time.monotonic() - self._drawn > _SECONDS_BETWEEN_FIGURES:
            self.draw()

    def draw(self) -> None:
        """Draw the curves of all rows so far."""
        self._drawn = time.monotonic()
        try:
            self._check()
        except UserError as error:  # which the keeper comes to as well
            self.failure = error
            return
        from trainer.report.figures import draw_curves  # noqa: PLC0415 (matplotlib: seconds that one rank needs)

        with self._kept():
            draw_curves(self.rows, self._folder / CURVES, title=self._title)

    def close(self) -> None:
        """Write no more."""
        self._metrics.close()

    @contextmanager
    def _kept(self) -> Iterator[None]:
        """Keep a full disk, or a folder that is gone, as one sentence."""
        try:
            yield
        except OSError as error:
            self.failure = UserError(
                f"{self._folder}: the figures could not be written ({error.strerror or error}). What was saved before "
                "is whole: make room, and the same command goes on from there"
            )


class NullLogger:
    """The other ranks' listener."""

    failure = None
    text = ""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Say nothing."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Say nothing."""

    def log_step(self, progress: Progress) -> None:
        """Say nothing."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Say nothing."""

    def draw(self) -> None:
        """Draw nothing."""

    def close(self) -> None:
        """Close nothing."""
