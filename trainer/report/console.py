"""What a person sees while a run trains: rich on a terminal, plain lines where there is none."""

import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, cast

import torch
from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import (
    Progress as Bar,
)

from trainer.loop import Progress
from trainer.report.metrics import Row

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal, figures within an epoch are told no more often than this."""


class Steady:
    """A text stream that falls silent where the one below fails.

    A terminal that was closed, a pipe that nobody reads, a log on a full disk: none of them ends a training.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write, if that is possible."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush, if that is possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_console(*, speaks: bool) -> Console:
    """Return the console of this process; only rank 0 speaks.

    Lines are broken at words on a terminal, and not at all where they go to a file.
    """
    console = Console(
        quiet=not speaks, highlight=False, markup=False, emoji=False, file=cast(IO[str], Steady(sys.stdout))
    )
    console.soft_wrap = not console.is_terminal
    return console


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process [bytes]: the GPU's where there is one, else the resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB


def duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def rate(examples_per_second: float) -> str:
    """Return a rate with three digits or more."""
    return f"{examples_per_second:,.0f}" if examples_per_second >= 100 else f"{examples_per_second:.1f}"


def size(count: int) -> str:
    """Return bytes in a unit that keeps the number short."""
    return f"{count / 2**30:.1f}G" if count >= 2**30 else f"{count / 2**20:.0f}M"


def row_header(parts: Sequence[str]) -> str:
    """Return the headings over `row_line`."""
    accuracies = "".join(f"{part + ' acc':>9}" for part in parts)
    return (
        f"{'epoch':>7}{'loss':>9}{'train acc':>11}{accuracies}{'ex/s':>8}{'compute':>9}"
        f"{'lr backbone/head':>19}{'mem':>6}"
    )


def row_line(row: Row, epochs: int, parts: Sequence[str]) -> str:
    """Return an epoch's row of the console."""
    accuracies = "".join(f"{row[f'{part}_accuracy']:9.3f}" for part in parts)
    lr = "/".join(f"{row[key]:.2g}" for key in ("lr_backbone", "lr_head") if key in row)
    return (
        f"{row['epoch']:>{6 - len(str(epochs))}}/{epochs}{row['train_loss']:9.4f}{row['train_accuracy']:11.3f}"
        f"{accuracies}{rate(row['examples_per_sec']):>8}{rate(row['examples_per_sec_compute']):>9}{lr:>19}"
        f"{size(row['memory_bytes']):>6}"
    )


def start_line(row: Row, parts: Sequence[str]) -> str:
    """Return the accuracy of each part before the first step."""
    found = [
        f"{part} accuracy {row[f'{part}_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}; "
        f"{row[f'{part}_correct']} of {row[f'{part}_seen']} right)"
        for part in parts
        for low, high in [row[f"{part}_interval"]]
    ]
    return f"before the first step: {', '.join(found)}"


class Display:
    """Progress with ETA while training, and a row for each epoch."""

    def __init__(self, console: Console, *, epochs: int, steps_per_epoch: int, done_steps: int) -> None:
        self.console = console
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self._head_shown = False
        self._spoke = time.monotonic()
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            transient=True,
            refresh_per_second=4,
            speed_estimate_period=120,
            disable=not console.is_terminal,
        )
        self._task = self._bar.add_task("", total=epochs * steps_per_epoch, completed=done_steps, figures="")

    @contextmanager
    def shown(self) -> Iterator[None]:
        """Show progress for as long as the block runs."""
        with self._bar:
            yield

    def start(self, row: Row, parts: Sequence[str]) -> None:
        """Print the accuracy before the first step."""
        self.console.print(start_line(row, parts))

    def step(self, epoch: int, epoch_step: int) -> None:
        """Move the bar by one update."""
        doing = "evaluating" if epoch_step == self.steps_per_epoch else "training"
        self._bar.update(self._task, advance=1, description=f"epoch {epoch}/{self.epochs} {doing}")

    def point(self, progress: Progress) -> None:
        """Show the figures of the epoch so far."""
        figures = progress.metrics
        text = f"loss {figures.loss:.3f} acc {figures.accuracy:.3f} {rate(figures.rate)} ex/s"
        self._bar.update(self._task, figures=text)
        silent = time.monotonic() - self._spoke
        if (
            not self.console.is_terminal
            and silent > SECONDS_BETWEEN_LINES
            and progress.epoch_step < self.steps_per_epoch
        ):
            self._spoke = time.monotonic()
            left = (
                (self.epochs * self.steps_per_epoch - progress.step) * figures.seconds / progress.epoch_step
            )
            self.console.print(
                f"  epoch {progress.epoch}/{self.epochs} step {progress.epoch_step}/{self.steps_per_epoch}  {text}"
                f"  ETA {duration(left)}"
            )

    def epoch(self, row: Row, parts: Sequence[str]) -> None:
        """Print an epoch's row."""
        if not self._head_shown:
            self.console.print(row_header(parts), style="bold")
            self._head_shown = True
        self._spoke = time.monotonic()
        self.console.print(row_line(row, self.epochs, parts))


@contextmanager
def checking(console: Console) -> Iterator[Callable[[int, int], None] | None]:
    """Show how many images have been checked: a bar on a terminal, elsewhere a line now and then.

    Yields what is called with (images checked, images in all).
    """
    if console.quiet:
        yield None
        return
    if not console.is_terminal:
        yield _line_now_and_then(console)
        return
    columns: list[Any] = [
        SpinnerColumn(),
        TextColumn("checking images"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
    ]
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_now_and_then(console: Console) -> Callable[[int, int], None]:
    spoke = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal spoke
        if time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            console.print(f"  checking images {done}/{total}")

    return show


@contextmanager
def downloading(console: Console, name: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show how much of `name` has come: a bar on a terminal, elsewhere a line for each tenth.

    Yields what is called with (bytes so far, bytes in all or None); nothing is seen until the first call, as
    what is cached needs none.
    """
    title = f"downloading {name}"
    if console.quiet:
        yield None
        return
    if not console.is_terminal:
        yield _line_each_tenth(console, title)
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    task: TaskID | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(title, completed=done, total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()
    if task is not None:
        seen = bar.tasks[0]
        console.print(f"{title}: {decimal(int(seen.completed))} in {seen.elapsed or 0:.0f} s")


def _line_each_tenth(console: Console, title: str) -> Callable[[int, int | None], None]:
    said = -1
    in_all: int | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal said, in_all
        in_all = total or in_all
        mark = done * 10 // in_all if in_all else done // 50_000_000
        if mark != said:
            console.print(f"{title}: " + (f"{mark * 10} % of {decimal(in_all)}" if in_all else decimal(done)))
            said = mark

    return show
