"""Strategies side by side: what their runs come to over seeds, as a table, as Markdown and as a figure."""

import math
import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.report.console import rate
from trainer.report.figures import fonts, save_figure
from trainer.report.metrics import Row, epoch_rows
from trainer.report.summary import reported_row

# 97.5 % points of Student's t (1908) with 1 to 30 degrees of freedom, as in any table of it.
_STUDENT = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_ROUNDING = 1e-9
"""Of a mean of accuracies: a run that has exactly that accuracy has reached it."""
_COLUMNS = ("accuracy", "epochs", "time [s]", "ex/s", "to first", "share")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a strategy."""

    seed: int
    accuracy: float
    """What the run reports: of its last epoch, or of the selected one where there is a part to select on."""
    curve: tuple[tuple[float, float], ...]
    """(training seconds, test accuracy) before the first update, where that was measured, and after each epoch."""
    epochs: int
    rate: float
    """Examples trained on a second, end to end."""

    @property
    def seconds(self) -> float:
        """Return the training time: of all epochs, and of what came before them; no evaluation, no saving."""
        return self.curve[-1][0]

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the training time after which the test accuracy was first as high as this; None: never."""
        return next((t for t, reached in self.curve if reached >= accuracy - _ROUNDING), None)


def trial_of(rows: list[Row], *, seed: int, selection: str | None) -> Trial:
    """Return what the rows of a finished run's metrics come to."""
    seconds = 0.0
    curve = []
    for row in rows:
        if row["kind"] in ("start", "epoch"):
            seconds += row.get("seconds", 0.0)
            curve.append((seconds, row["test_accuracy"]))
    epochs = epoch_rows(rows)
    return Trial(
        seed=seed,
        accuracy=reported_row(epochs, selection)["test_accuracy"],
        curve=tuple(curve),
        epochs=len(epochs),
        rate=sum(row["train_seen"] for row in epochs) / sum(row["seconds"] for row in epochs),
    )


@dataclass(frozen=True, kw_only=True)
class Summary:
    """One strategy over its seeds."""

    strategy: str
    trials: tuple[Trial, ...]
    """Of the seeds that came to their end."""
    failures: Mapping[int, str]
    """Seed -> why its run did not."""
    accuracy: float | None
    """Mean over the seeds; None: there is none."""
    half: float | None
    """Half the 95 % interval of that mean (Student's t); None: fewer than two seeds."""
    seconds: float | None
    """Mean training time."""
    rate: float | None
    """Mean of examples a second."""
    to_first: float | None
    """Mean training time to the first strategy's mean accuracy; None where not all seeds reach it."""
    reached: int
    """Seeds that do."""
    share: float | None
    """`to_first` over the first strategy's training time."""


def half_interval(values: Sequence[float]) -> float | None:
    """Return half the 95 % interval of the mean of a few values, by Student's t; None for fewer than two.

    Beyond 31 values it is that of 31, which is a little wide.
    """
    if len(values) < 2:
        return None
    t = _STUDENT[min(len(values) - 1, len(_STUDENT)) - 1]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def summarize(
    trials: Mapping[str, Sequence[Trial]], failures: Mapping[str, Mapping[int, str]]
) -> tuple[Summary, ...]:
    """Return each strategy's figures, in order; the first is what the others are measured by."""
    first = next(iter(trials.values()))
    target = statistics.fmean(trial.accuracy for trial in first) if first else None
    whole = statistics.fmean(trial.seconds for trial in first) if first else None

    def summary(strategy: str, found: Sequence[Trial]) -> Summary:
        times = [trial.seconds_to(target) for trial in found] if target is not None else []
        reached = [time for time in times if time is not None]
        to_first = statistics.fmean(reached) if reached and len(reached) == len(found) else None
        accuracies = [trial.accuracy for trial in found]
        return Summary(
            strategy=strategy,
            trials=tuple(found),
            failures=failures.get(strategy, {}),
            accuracy=statistics.fmean(accuracies) if found else None,
            half=half_interval(accuracies),
            seconds=statistics.fmean(trial.seconds for trial in found) if found else None,
            rate=statistics.fmean(trial.rate for trial in found) if found else None,
            to_first=to_first,
            reached=len(reached),
            share=to_first / whole if to_first is not None and whole else None,
        )

    return tuple(summary(strategy, found) for strategy, found in trials.items())


def _cells(summary: Summary) -> tuple[str, ...]:
    """Return the texts of `_COLUMNS`."""
    if summary.accuracy is None or summary.seconds is None or summary.rate is None:
        return ("failed", *["-"] * (len(_COLUMNS) - 1))
    seeds = len(summary.trials)
    accuracy = f"{summary.accuracy:.3f}" + (f" ± {summary.half:.3f}" if summary.half is not None else "")
    if summary.failures:
        accuracy += f" ({seeds} of {seeds + len(summary.failures)})"
    return (
        accuracy,
        "/".join(str(n) for n in sorted({trial.epochs for trial in summary.trials})),
        f"{summary.seconds:.1f}",
        rate(summary.rate),
        f"- ({summary.reached} of {seeds})" if summary.to_first is None else f"{summary.to_first:.1f}",
        "-" if summary.share is None else f"{summary.share:.2f}",
    )


def _why(failures: Mapping[int, str]) -> str:
    """Return the first clause of the first seed's error, for a cell."""
    return re.split(r": |\. |\n", next(iter(failures.values()), "no run"), maxsplit=1)[0]


def table(summaries: Sequence[Summary]) -> Table:
    """Return the comparison for a terminal of 80 columns; the epochs are told only where they differ."""
    found = Table(box=SIMPLE_HEAD, pad_edge=False)
    found.add_column("strategy", overflow="fold")
    rows = {summary.strategy: _cells(summary) for summary in summaries}
    epochs = _COLUMNS.index("epochs")
    told = [
        i
        for i in range(len(_COLUMNS))
        if i != epochs or len({cells[i] for cells in rows.values()} - {"-"}) > 1
    ]
    for i in told:
        found.add_column(_COLUMNS[i], justify="right", no_wrap=True)
    for strategy, cells in rows.items():
        found.add_row(strategy, *(cells[i] for i in told))
    return found


def notes(summaries: Sequence[Summary]) -> list[str]:
    """Return what the columns mean, and why runs have failed."""
    first = summaries[0]
    seeds = max(len(summary.trials) for summary in summaries)
    lines = [
        "accuracy: on the test images, "
        + (
            "mean over seeds ± 95 % interval (Student's t); "
            if seeds > 1
            else "of one seed, so without interval; "
        )
        + "time: training seconds, those of a linear probe included, without evaluation and saving",
    ]
    if first.accuracy is not None:
        lines.append(
            f"to first: seconds of these until the test accuracy reaches {first.accuracy:.3f}, the mean that "
            f"{first.strategy} ends at (-: not with every seed); share: the same over {first.strategy}'s time"
        )
    lines += [
        f"{summary.strategy}, seed {seed} failed: {why.partition(chr(10))[0]}"
        for summary in summaries
        for seed, why in summary.failures.items()
    ]
    return lines


def markdown(summaries: Sequence[Summary], *, command: str, facts: Sequence[str]) -> str:
    """Return the comparison as a Markdown file."""
    lines = ["# Comparison of strategies", "", "```sh", command, "```", ""]
    lines += [*(f"- {fact}" for fact in facts), ""]
    lines += ["| strategy | " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * len(_COLUMNS)]
    for summary in summaries:
        accuracy, *others = _cells(summary)
        if not summary.trials:
            accuracy += f": {_why(summary.failures)}"
        cells = (summary.strategy, accuracy, *others)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(summaries)), ""])


def draw_comparison(summaries: Sequence[Summary], path: Path, *, title: str) -> None:
    """Draw test accuracy over training seconds: each strategy's mean over seeds, in a band from least to greatest.

    Where seeds have come to different numbers of epochs, as far as all of them have.
    """
    figure = Figure(figsize=(6.4, 4.0), layout="constrained")
    axes = figure.add_subplot()
    for number, summary in enumerate(summaries):
        if not summary.trials:
            continue
        points = list(zip(*(trial.curve for trial in summary.trials), strict=False))
        times = [statistics.fmean(time for time, _ in point) for point in points]
        reached = [[accuracy for _, accuracy in point] for point in points]
        colour = f"C{number % 10}"
        axes.plot(
            times,
            list(map(statistics.fmean, reached)),
            "-o",
            markersize=3,
            color=colour,
            label=summary.strategy,
        )
        axes.fill_between(
            times, list(map(min, reached)), list(map(max, reached)), color=colour, alpha=0.15, linewidth=0
        )
    first = summaries[0]
    if first.accuracy is not None:
        axes.axhline(first.accuracy, color="C0", linestyle=":", linewidth=1)
    axes.set(xlabel="training [s]", ylabel="test accuracy")
    axes.set_xlim(left=0)
    axes.set_title(title, fontfamily=fonts(), fontsize=9, wrap=True, parse_math=False)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(handles, labels, fontsize=8, frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)
    save_figure(figure, path, dpi=150)
