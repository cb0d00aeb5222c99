"""Logger of a run: console, metrics.jsonl and curves.png, on rank 0."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from regraft.contract import CURVES, METRICS
from trainer.errors import UserError
from trainer.evaluate import Evaluations
from trainer.metrics import Progress
from trainer.optim.schedule import TrainSchedule
from trainer.report.console import ProgressBar, peak_memory
from trainer.report.metrics import MetricsFile, Row, epoch_row, epoch_rows, start_row, train_row
from trainer.run.session import OpenRun

_SECONDS_BETWEEN_CURVES = 20.0  # drawing must not slow down short epochs


class RunLogger:
    """Rank 0's logger.

    A failure to write is kept in `failure`: only rank 0 knows of it, and all processes have to stop for it together.
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
        """Start with the metrics of a checkpoint.

        Args:
            progress_bar: on the console.
            folder: of the run.
            title: of the curves.
            device: whose peak memory is logged.
            text: metrics.jsonl so far; empty for a new run.
            check: raises a UserError if this process may no longer write into the folder.

        Raises:
            UserError: metrics.jsonl cannot be written.

        """
        self.failure: UserError | None = None
        self._progress_bar = progress_bar
        self._folder, self._title, self._device = folder, title, device
        self._drawn_at = 0.0
        self._check = check
        with self._keep_failure():
            self._metrics = MetricsFile(folder / METRICS, text)
        if self.failure is not None:  # before training, all processes learn of it at once
            raise self.failure

    @property
    def rows(self) -> list[Row]:
        """Return the rows so far."""
        return self._metrics.rows

    @property
    def epochs(self) -> list[Row]:
        """Return the rows of whole epochs."""
        return epoch_rows(self.rows)

    @property
    def text(self) -> str:
        """Return metrics.jsonl so far."""
        return self._metrics.text

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Log the evaluation before the first step; `seconds` is the time that fitting the output layer took."""
        row = start_row(evaluations, seconds)
        with self._keep_failure():
            self._metrics.append(row)
        self._progress_bar.print_start(row, tuple(evaluations))

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Advance the progress bar."""
        self._progress_bar.advance(epoch, epoch_step)

    def log_step(self, progress: Progress) -> None:
        """Log the metrics within an epoch."""
        self._progress_bar.show_metrics(progress)
        with self._keep_failure():
            self._metrics.append(train_row(progress, self._progress_bar.steps_per_epoch))

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Log an epoch, and draw the curves again."""
        row = epoch_row(progress, evaluations, peak_memory(self._device))
        with self._keep_failure():
            self._metrics.append(row)
        self._progress_bar.print_epoch(row, tuple(evaluations))
        if time.monotonic() - self._drawn_at > _SECONDS_BETWEEN_CURVES:
            self.draw_curves()

    def draw_curves(self) -> None:
        """Draw the curves of all rows so far."""
        self._drawn_at = time.monotonic()
        try:
            self._check()
        except UserError as error:  # the checkpoint manager meets it as well
            self.failure = error
            return
        from trainer.report.figures import draw_curves  # noqa: PLC0415 (matplotlib takes seconds, on one rank only)

        with self._keep_failure():
            draw_curves(self.rows, self._folder / CURVES, title=self._title)

    def close(self) -> None:
        """Draw the curves for the last time, and close metrics.jsonl."""
        self.draw_curves()
        self._metrics.close()

    @contextmanager
    def _keep_failure(self) -> Iterator[None]:
        """Keep a full disk, or a folder that is gone, as one clear message."""
        try:
            yield
        except OSError as error:
            self.failure = UserError(
                f"{self._folder}: the metrics could not be written ({error.strerror or error}). What was saved before "
                "is whole: make room, and the same command resumes from there"
            )


class NullLogger:
    """The other ranks' logger: it logs nothing."""

    failure = None
    text = ""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.epochs: list[Row] = []

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Log nothing."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Log nothing."""

    def log_step(self, progress: Progress) -> None:
        """Log nothing."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations) -> None:
        """Log nothing."""

    def close(self) -> None:
        """Close nothing."""


def make_logger(
    run: OpenRun, schedule: TrainSchedule, *, title: str, done_steps: int, metrics: str
) -> tuple[RunLogger | NullLogger, ProgressBar]:
    """Return this process's logger and progress bar. Every process must call it.

    Args:
        run: the open run folder.
        schedule: the updates of the run.
        title: of the curves.
        done_steps: updates completed.
        metrics: metrics.jsonl of the checkpoint; empty for a new run.

    Raises:
        UserError: metrics.jsonl cannot be written.

    """
    progress_bar = ProgressBar(
        run.console, epochs=schedule.epochs, steps_per_epoch=schedule.steps_per_epoch, done_steps=done_steps
    )

    def make() -> RunLogger | NullLogger:
        if not run.is_writer:
            return NullLogger()
        return RunLogger(
            progress_bar,
            folder=run.folder,
            title=title,
            device=run.ctx.device,
            text=metrics,
            check=run.check_lock,
        )

    return run.ctx.main_process_first(make), progress_bar
