"""Logger of a run: console, metrics.jsonl, curves.png and report.html, on rank 0."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch

from regraft.contract import CURVES, METRICS
from trainer.errors import UserError
from trainer.evaluate import Evaluations
from trainer.metrics import Progress
from trainer.optim.schedule import TrainSchedule
from trainer.report.console import ProgressBar, peak_memory
from trainer.report.figures import draw_curves, try_write_figure
from trainer.report.metrics import MetricsFile, Row, class_rows, epoch_row, epoch_rows, parse_rows, start_row, train_row
from trainer.report.tracker_services import Service
from trainer.report.trackers import Trackers
from trainer.run.atomic import describe_missing
from trainer.run.session import OpenRun

_SECONDS_BETWEEN_CURVES = 20.0  # drawing must not slow down short epochs


class RunLogger:
    """Logger of rank 0.

    A write error is stored in `failure` and not raised: only rank 0 knows of it, and all ranks must stop together.
    """

    def __init__(
        self,
        progress_bar: ProgressBar,
        *,
        folder: Path,
        title: str,
        classes: Sequence[str],
        device: torch.device,
        text: str,
        trackers: Trackers,
        check: Callable[[], None],
        writes_report: bool = False,
    ) -> None:
        """Start with the metrics of a checkpoint.

        Args:
            progress_bar: progress bar on the console.
            folder: folder of the run.
            title: title of the curves.
            classes: names of the classes.
            device: device whose peak memory is logged.
            text: content of metrics.jsonl so far; empty for a new run.
            trackers: experiment trackers.
            check: raises a UserError if this process may no longer write into the folder.
            writes_report: whether report.html is written with the curves.

        Raises:
            UserError: metrics.jsonl cannot be written.

        """
        self.failure: UserError | None = None
        self._progress_bar = progress_bar
        self._folder, self._title, self._classes, self._device = folder, title, classes, device
        self._drawn_at, self._has_warned = time.monotonic(), False
        self._check, self._trackers, self._writes_report = check, trackers, writes_report
        with self._store_failure():
            self._metrics = MetricsFile(folder / METRICS, text)
        # Before training, an error may be raised: make_logger raises it on all ranks.
        if self.failure is not None:
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
        """Return the content of metrics.jsonl so far."""
        return self._metrics.text

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Log the evaluation before the first step; `seconds` is the time to fit the output layer."""
        row = start_row(evaluations, seconds)
        self._append([row])
        self._progress_bar.print_start(row, tuple(evaluations))

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Advance the progress bar."""
        self._progress_bar.advance(epoch, epoch_step)

    def log_step(self, progress: Progress) -> None:
        """Log a step within an epoch."""
        row = train_row(progress, self._progress_bar.steps_per_epoch, peak_memory(self._device))
        self._progress_bar.show_metrics(row)
        self._append([row])

    def log_epoch(self, progress: Progress, evaluations: Evaluations, evaluation_seconds: float) -> None:
        """Log an epoch."""
        memory = peak_memory(self._device)
        row = epoch_row(progress, evaluations, evaluation_seconds=evaluation_seconds, memory=memory)
        self._append([row, *class_rows(progress, evaluations, self._classes)])
        self._progress_bar.print_epoch(row, tuple(evaluations))

    def _append(self, rows: Sequence[Row]) -> None:
        with self._store_failure():
            for row in rows:
                self._metrics.append(row)
        self._trackers.log(rows)

    def draw_curves(self) -> None:
        """Draw the curves of all rows so far, unless they were drawn a moment ago."""
        if time.monotonic() - self._drawn_at > _SECONDS_BETWEEN_CURVES:
            self._draw_curves()

    def _draw_curves(self) -> None:
        self._drawn_at = time.monotonic()
        try:
            self._check()
        except UserError as error:  # the checkpoint manager raises it too
            self.failure = error
            return
        draw = partial(draw_curves, self.rows, title=self._title)
        try_write_figure(self._folder / CURVES, draw, size=(6.4, 5.6), warn=self._warn)
        if self._writes_report:
            from trainer.pages.run_report import try_write_report  # noqa: PLC0415 (no run needs jinja2 at its start)

            try_write_report(self._folder, pictures=False, warn=self._warn)

    def _warn(self, message: str) -> None:
        if not self._has_warned:
            self._progress_bar.console.print(message)
        self._has_warned = True

    def close(self) -> None:
        """Draw the curves for the last time, and close metrics.jsonl."""
        self._draw_curves()
        self._metrics.close()

    @contextmanager
    def _store_failure(self) -> Iterator[None]:
        """Store an OSError, such as a full disk, as a UserError in `failure`."""
        try:
            yield
        except OSError as error:
            self.failure = UserError(
                describe_missing(self._folder / METRICS, error)
                or f"{self._folder}: the metrics could not be written ({error.strerror or error}). Earlier "
                "checkpoints are complete: free some disk space, and the same command resumes from the newest one"
            )


class NullLogger:
    """Logger of the other ranks, which logs nothing."""

    failure = None
    text = ""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.epochs: list[Row] = []

    def log_start(self, evaluations: Evaluations, seconds: float) -> None:
        """Do nothing."""

    def log_progress(self, epoch: int, epoch_step: int) -> None:
        """Do nothing."""

    def log_step(self, progress: Progress) -> None:
        """Do nothing."""

    def log_epoch(self, progress: Progress, evaluations: Evaluations, evaluation_seconds: float) -> None:
        """Do nothing."""

    def draw_curves(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


def make_logger(
    run: OpenRun,
    schedule: TrainSchedule,
    *,
    title: str,
    classes: Sequence[str],
    done_steps: int,
    metrics: str,
    services: Sequence[Service],
    project: str,
) -> tuple[RunLogger | NullLogger, ProgressBar, Trackers]:
    """Return the logger, the progress bar and the trackers of this process. Every process must call it.

    Args:
        run: the open run folder.
        schedule: schedule of the run.
        title: title of the curves.
        classes: names of the classes.
        done_steps: number of updates completed.
        metrics: content of metrics.jsonl in the checkpoint; empty for a new run.
        services: names of the experiment trackers.
        project: project of the run in the trackers.

    Raises:
        UserError: metrics.jsonl cannot be written, or a tracker cannot be started.

    """
    progress_bar = ProgressBar(
        run.console, epochs=schedule.epochs, steps_per_epoch=schedule.steps_per_epoch, done_steps=done_steps
    )
    trackers = Trackers(services if run.is_writer else (), project, run)

    def make() -> RunLogger | NullLogger:
        if not run.is_writer:
            return NullLogger()
        logger = RunLogger(
            progress_bar,
            folder=run.folder,
            title=title,
            classes=classes,
            device=run.ctx.device,
            text=metrics,
            trackers=trackers,
            check=run.check_lock,
            writes_report=run.writes_report,
        )
        trackers.start(logger.rows)
        return logger

    return run.ctx.main_process_first(make), progress_bar, trackers


def complete_trackers(run: OpenRun, services: Sequence[Service], project: str, *, metrics: str, step: int) -> None:
    """Send what the trackers of a finished run lack: its last start may have ended before everything was sent.

    Every process must call it.

    Args:
        run: the open run folder.
        services: names of the experiment trackers.
        project: project of the run in the trackers.
        metrics: content of metrics.jsonl.
        step: updates of the run.

    Raises:
        UserError: a tracker that the run did not have before cannot be started.

    """

    def complete() -> None:
        trackers = Trackers(services if run.is_writer else (), project, run)
        trackers.start(parse_rows(metrics, METRICS), finished_at=step)
        trackers.finish(step)

    run.ctx.main_process_first(complete)
