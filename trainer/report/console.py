"""Console output of a run: progress bars on a terminal, plain lines otherwise."""

import io
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from typing import IO, Any, cast

import torch
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from regraft.sparkline import sparkline
from trainer.report.metrics import Row

SECONDS_BETWEEN_LINES = 10.0
"""Minimum time between two progress lines if the output is not a terminal."""
_CHART_WIDTH = 20
"""Width of the chart of the training loss."""


class BrokenPipeSafeStream:
    """Text stream that ignores errors of the stream it wraps.

    A closed terminal, a broken pipe, a log file on a full disk or an ASCII terminal does not end the training.
    """

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write `text`; replace characters that the stream cannot encode, and ignore errors."""
        with suppress(OSError, ValueError):  # a closed file is a ValueError
            try:
                self._stream.write(text)
            except UnicodeEncodeError as error:
                self._stream.write(text.encode(error.encoding, "replace").decode(error.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush; ignore errors."""
        with suppress(OSError, ValueError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def make_console(*, enabled: bool, stream: IO[str] | None = None) -> Console:
    """Return the console of this process; it prints only if `enabled` is true, as on rank 0.

    It prints to `stream`, by default to standard output.

    Long lines are wrapped on a terminal, but not in a file.
    """
    # Python has no standard output if it was closed before the start, as by `>&-`.
    safe_stream = cast(IO[str], BrokenPipeSafeStream(stream or sys.stdout or io.StringIO()))
    console = Console(quiet=not enabled, highlight=False, markup=False, emoji=False, file=safe_stream)
    console.soft_wrap = not console.is_terminal
    if console.width < 20:  # COLUMNS=0, as some programs leave it, would print nothing
        console.width = 80
    return console


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this process [bytes]: allocated on the GPU, or resident in RAM on a CPU."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # in KiB on Linux


def format_duration(seconds: float) -> str:
    """Return seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def format_rate(examples_per_second: float) -> str:
    """Return a rate with at least three digits."""
    return f"{examples_per_second:,.0f}" if examples_per_second >= 100 else f"{examples_per_second:.1f}"


def format_bytes(count: int) -> str:
    """Return a number of bytes in MiB (`M`) or GiB (`G`)."""
    return f"{count / 2**30:.1f}G" if count >= 2**30 else f"{count / 2**20:.0f}M"


def wait_share(rate: float, compute_rate: float) -> float:
    """Return the fraction of time that training waits for data, from examples per second with and without loading."""
    return max(0.0, 1 - rate / compute_rate)


def epoch_header(splits: Sequence[str]) -> str:
    """Return the column headings of `format_epoch`, at most 80 characters."""
    return (
        f"{'epoch':>7}{'loss':>8}{'acc ' + '/'.join(('train', *splits)):>19}{'ex/s':>8}{'compute':>9}{'wait':>6}"
        f"{'lr backbone/head':>17}{'mem':>6}"
    )


def format_epoch(row: Row, epochs: int, splits: Sequence[str]) -> str:
    """Return the console line of an epoch."""
    accuracies = "/".join(f"{row[f'{split}_accuracy']:.3f}" for split in ("train", *splits))
    rate, compute_rate = row["examples_per_sec"], row["examples_per_sec_compute"]
    return (
        f"{row['epoch']:>{6 - len(str(epochs))}}/{epochs}{row['train_loss']:8.4f}{accuracies:>19}"
        f"{format_rate(rate):>8}{format_rate(compute_rate):>9}{wait_share(rate, compute_rate):>6.0%}"
        f"{format_lr(row):>17}{format_bytes(row['memory_bytes']):>6}"
    )


def format_lr(row: Row) -> str:
    """Return the learning rates of backbone and head; without a trainable backbone, that of the head."""
    return "/".join(f"{row[key]:.2g}" for key in ("lr_backbone", "lr_head") if key in row)


def format_start(row: Row, splits: Sequence[str]) -> str:
    """Return the console line of the evaluation before the first step."""
    accuracies = []
    for split in splits:
        low, high = row[f"{split}_interval"]
        accuracies.append(
            f"{split} accuracy {row[f'{split}_accuracy']:.3f} (95 % interval {low:.3f} to {high:.3f}; "
            f"{row[f'{split}_correct']} of {row[f'{split}_seen']} correct)"
        )
    return f"before the first step: {', '.join(accuracies)}"


class ProgressBar:
    """Training progress with ETA, and one line per epoch."""

    def __init__(self, console: Console, *, epochs: int, steps_per_epoch: int, done_steps: int) -> None:
        self.console = console
        self.epochs, self.steps_per_epoch = epochs, steps_per_epoch
        self._header_printed = False
        self._last_line = time.monotonic()
        self._losses: list[float] = []
        self._evaluation_seconds = 0.0  # of the epoch before
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TextColumn("ETA"),
            TimeRemainingColumn(compact=True),
            console=console,
            speed_estimate_period=120,
        )
        self._metrics = Text(no_wrap=True, overflow="ellipsis")
        self._live = Live(Group(self._bar, self._metrics), console=console, transient=True, refresh_per_second=4)
        epoch = min(epochs, done_steps // steps_per_epoch + 1)
        description = f"epoch {epoch}/{epochs} training"
        self._task = self._bar.add_task(description, total=epochs * steps_per_epoch, completed=done_steps)

    @contextmanager
    def show(self) -> Iterator[None]:
        """Show the bar inside a `with` block, if the console is a terminal."""
        with self._live if self.console.is_terminal else nullcontext():
            yield

    def print_start(self, row: Row, splits: Sequence[str]) -> None:
        """Print the evaluation before the first step."""
        self.console.print(format_start(row, splits))

    def advance(self, epoch: int, epoch_step: int) -> None:
        """Advance the bar by one update."""
        phase = "evaluating" if epoch_step == self.steps_per_epoch else "training"
        self._bar.update(self._task, advance=1, description=f"epoch {epoch}/{self.epochs} {phase}")

    def show_metrics(self, row: Row) -> None:
        """Show a row of kind `train`: below the bar, or as a line every few seconds.

        Args:
            row: as in metrics.jsonl.

        """
        self._losses.append(row["train_loss"])
        loss, accuracy = f"loss {row['train_loss']:.3f}", f"acc {row['train_accuracy']:.3f}"
        rate, compute_rate = row["examples_per_sec"], row["examples_per_sec_compute"]
        speed, wait = f"{format_rate(rate)} ex/s", f"wait {wait_share(rate, compute_rate):.0%}"
        if self.console.is_terminal:
            chart = sparkline(self._losses, width=_CHART_WIDTH) if self.console.encoding.startswith("utf") else ""
            self._metrics.plain = (
                f"{loss} {chart}  {accuracy}  lr {format_lr(row)}\n"
                f"{speed}  compute {format_rate(compute_rate)} ex/s  {wait}  mem {format_bytes(row['memory_bytes'])}"
            )
            return
        epoch, step = divmod(row["step"] - 1, self.steps_per_epoch)
        is_due = time.monotonic() - self._last_line > SECONDS_BETWEEN_LINES and step + 1 < self.steps_per_epoch
        if is_due:
            self._last_line = time.monotonic()
            eta = (self.epochs * self.steps_per_epoch - row["step"]) * row["seconds"] / (step + 1)
            eta += (self.epochs - epoch) * self._evaluation_seconds
            self.console.print(
                f"  epoch {epoch + 1}/{self.epochs} step {step + 1}/{self.steps_per_epoch}  {loss}  {accuracy}  "
                f"{speed}  {wait}  ETA {format_duration(eta)}"
            )

    def print_epoch(self, row: Row, splits: Sequence[str]) -> None:
        """Print the line of an epoch, and the header before the first one."""
        if not self._header_printed:
            self.console.print(epoch_header(splits), style="bold")
            self._header_printed = True
        self._last_line, self._evaluation_seconds = time.monotonic(), row["evaluation_seconds"]
        self.console.print(format_epoch(row, self.epochs, splits))
