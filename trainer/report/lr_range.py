"""Output of a learning-rate range test: progress bar, `lr-find.png` and the final table."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from trainer.commands.lr_range import Suggestion, smoothed
from trainer.report.console import SECONDS_BETWEEN_LINES
from trainer.report.figures import set_title

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@contextmanager
def lr_range_progress(console: Console, steps: int) -> Iterator[Callable[[float, float], None]]:
    """Show progress of a range test: a bar on a terminal, otherwise a line every few seconds.

    Yields a function to call with (learning rate, loss) after each update.
    """
    progress = Progress(
        TextColumn("learning rates"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[metrics]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = progress.add_task("", total=steps, metrics="")
    last_line, step = time.monotonic(), 0

    def show(rate: float, loss: float) -> None:
        nonlocal last_line, step
        step += 1
        text = f"lr {rate:.2g} loss {loss:.3f}"
        progress.update(task, advance=1, metrics=text)
        if not console.is_terminal and time.monotonic() - last_line > SECONDS_BETWEEN_LINES:
            last_line = time.monotonic()
            console.print(f"  {step}/{steps}  {text}")

    with progress:
        yield show


def draw_range(
    rates: Sequence[float], losses: Sequence[float], suggestion: Suggestion, figure: "Figure", *, title: str
) -> None:
    """Draw loss over learning rate, one point per update, and the suggested rates; all losses are finite."""
    axes = figure.add_subplot()
    averages = smoothed(losses)
    axes.plot(rates, losses, color="tab:blue", alpha=0.3, linewidth=1, label="batch loss")
    axes.plot(rates, averages, color="tab:blue", label="smoothed loss")
    for rate, label, color in (
        (suggestion.steepest, "steepest descent", "tab:green"),
        (suggestion.tenth, "minimum / 10", "tab:orange"),
    ):
        if rate is not None:
            is_suggested = rate == suggestion.lr
            axes.axvline(
                rate,
                color=color,
                linestyle="-" if is_suggested else "--",
                label=f"{label}: {rate:.2g}" + (", suggested" if is_suggested else ""),
            )
    low, high = min([*averages, *losses], default=0), max(averages[: max(1, len(averages) // 2)], default=1)
    axes.set_ylim(max(0.0, low - 0.05 * (high - low)), low + 2.0 * max(high - low, 1e-3))
    axes.set(xscale="log", xlabel="optim.lr", ylabel="loss before the update")
    set_title(axes, title)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def range_table(
    rates: Sequence[float], losses: Sequence[float], suggestion: Suggestion, *, configured: float, diverged: bool
) -> Table:
    """Return a table of the important learning rates with their smoothed losses.

    Args:
        rates: learning rate of each update.
        losses: loss of each update.
        suggestion: result of the range test.
        configured: the current `optim.lr`.
        diverged: whether the test ended early because the loss diverged.

    """
    averages = smoothed(losses)
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("optim.lr", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def add_row(name: str, rate: float, loss: float | None) -> None:
        mark = "suggested" if rate == suggestion.lr else ""
        table.add_row(name, f"{rate:.2g}", "" if loss is None else f"{loss:.4f}", mark)

    def loss_at(rate: float) -> float:
        return averages[min(range(len(averages)), key=lambda i: abs(rates[i] / rate - 1))]

    add_row("first", rates[0], averages[0] if averages else None)
    if suggestion.steepest is not None and suggestion.tenth is not None:
        minimum = 10 * suggestion.tenth
        add_row("steepest descent", suggestion.steepest, loss_at(suggestion.steepest))
        add_row("minimum / 10", suggestion.tenth, loss_at(suggestion.tenth))
        add_row("minimum", minimum, loss_at(minimum))
    last_rate = rates[len(losses) - 1] if losses else rates[0]
    add_row("diverged" if diverged else "last", last_rate, averages[-1] if averages else None)
    add_row("configured", configured, None)
    return table
