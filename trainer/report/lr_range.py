"""What is seen of a learning-rate range test: its progress, `lr-find.png`, and the table at its end."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table

from trainer.commands.lr_range import Suggestion, smoothed
from trainer.report.console import SECONDS_BETWEEN_LINES
from trainer.report.figures import fonts, save_figure


@contextmanager
def testing(console: Console, steps: int) -> Iterator[Callable[[float, float], None]]:
    """Show how far a test has come: a bar on a terminal, elsewhere a line now and then.

    Yields what is called with (learning rate, loss) after each update.
    """
    bar = Progress(
        TextColumn("learning rates"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TextColumn("{task.fields[figures]}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    task = bar.add_task("", total=steps, figures="")
    spoke, done = time.monotonic(), 0

    def show(rate: float, loss: float) -> None:
        nonlocal spoke, done
        done += 1
        text = f"lr {rate:.2g} loss {loss:.3f}"
        bar.update(task, advance=1, figures=text)
        if not console.is_terminal and time.monotonic() - spoke > SECONDS_BETWEEN_LINES:
            spoke = time.monotonic()
            console.print(f"  {done}/{steps}  {text}")

    with bar:
        yield show


def draw_range(
    tried: Sequence[float], losses: Sequence[float], found: Suggestion, path: Path, *, title: str
) -> None:
    """Draw the (finite) loss of each update over its learning rate, and the rates that it suggests."""
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    averages = smoothed(losses)
    axes.plot(tried, losses, color="tab:blue", alpha=0.3, linewidth=1, label="loss of the batch")
    axes.plot(tried, averages, color="tab:blue", label="smoothed")
    for rate, label, colour in (
        (found.steepest, "steepest descent", "tab:green"),
        (found.tenth, "a tenth of the minimum's", "tab:orange"),
    ):
        if rate is not None:
            chosen = rate == found.lr
            axes.axvline(
                rate,
                color=colour,
                linestyle="-" if chosen else "--",
                label=f"{label}: {rate:.2g}" + ", suggested" * chosen,
            )
    low, high = min([*averages, *losses], default=0), max(averages[: max(1, len(averages) // 2)], default=1)
    axes.set_ylim(max(0.0, low - 0.05 * (high - low)), low + 2.0 * max(high - low, 1e-3))
    axes.set(xscale="log", xlabel="optim.lr", ylabel="loss before the update")
    axes.set_title(title, fontfamily=fonts(), fontsize=9, wrap=True, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    save_figure(figure, path, dpi=150)


def range_table(
    tried: Sequence[float], losses: Sequence[float], found: Suggestion, *, configured: float, ended: bool
) -> Table:
    """Return the rates that matter, each with the smoothed loss there; `ended`: the last one diverged."""
    averages = smoothed(losses)
    table = Table("", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("optim.lr", "loss"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)

    def row(name: str, rate: float, loss: float | None) -> None:
        mark = "suggested" if rate == found.lr else ""
        table.add_row(name, f"{rate:.2g}", "" if loss is None else f"{loss:.4f}", mark)

    def near(rate: float) -> float:
        return averages[min(range(len(averages)), key=lambda i: abs(tried[i] / rate - 1))]

    row("first", tried[0], averages[0] if averages else None)
    if found.steepest is not None and found.tenth is not None:
        row("the loss falls fastest", found.steepest, near(found.steepest))
        row("a tenth of the next", found.tenth, near(found.tenth))
        row("lowest before it rises", 10 * found.tenth, near(10 * found.tenth))
    row(
        "diverged" if ended else "last",
        tried[len(losses) - 1] if losses else tried[0],
        averages[-1] if averages else None,
    )
    row("as configured", configured, None)
    return table
