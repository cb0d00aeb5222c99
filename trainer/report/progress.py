"""Progress displays of the data's preparation: downloads, image checks, and the image cache."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from trainer.data.progress import ProgressHooks

SECONDS_BETWEEN_LINES = 10.0
"""Without a terminal, progress is printed at most this often."""


def progress_hooks(console: Console) -> ProgressHooks:
    """Return progress displays on this console."""
    return ProgressHooks(
        downloading=partial(downloading, console),
        checking=partial(counting, console, "checking"),
        caching=partial(counting, console, "caching"),
        comparing=partial(counting, console, "comparing"),
    )


@contextmanager
def counting(console: Console, what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Show the progress of `what` images: a bar on a terminal, otherwise a line every few seconds.

    Yields a function to call with (images done, total images), or None if the console is quiet.
    """
    if console.quiet:
        yield None
        return
    if not console.is_terminal:
        yield _line_every_few_seconds(console, what)
        return
    bar = Progress(
        SpinnerColumn(),
        TextColumn(f"{what} images"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        console=console,
        transient=True,
    )
    with bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _line_every_few_seconds(console: Console, what: str) -> Callable[[int, int], None]:
    last_line = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last_line
        if time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            console.print(f"  {what} images {done}/{total}")

    return show


@contextmanager
def downloading(console: Console, name: str) -> Iterator[Callable[[int, int | None], None] | None]:
    """Show the progress of the download of `name`: a bar on a terminal, otherwise a line per 10 %.

    Yields a function to call with (downloaded bytes, total bytes or None), or None if the console is quiet.
    Nothing is shown before the first call: a cached file makes none.
    """
    title = f"downloading {name}"
    if console.quiet:
        yield None
        return
    if not console.is_terminal:
        yield _line_per_tenth(console, title)
        return
    bar = Progress(
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
        finished = bar.tasks[0]
        console.print(f"{title}: {decimal(int(finished.completed))} in {finished.elapsed or 0:.0f} s")


def _line_per_tenth(console: Console, title: str) -> Callable[[int, int | None], None]:
    last_printed = -1
    known_total: int | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal last_printed, known_total
        known_total = total or known_total
        tenth = done * 10 // known_total if known_total else done // 50_000_000
        if tenth != last_printed:
            size = f"{tenth * 10} % of {decimal(known_total)}" if known_total else decimal(done)
            console.print(f"{title}: {size}")
            last_printed = tenth

    return show
