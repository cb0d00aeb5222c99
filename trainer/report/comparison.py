"""Compare strategies over several seeds: summary statistics, and their output as table, Markdown and figure."""

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from rich.box import SIMPLE_HEAD
from rich.table import Table

from trainer.errors import UserError
from trainer.evaluate import SelectBy
from trainer.report.console import format_rate
from trainer.report.figures import set_title, try_write_figure
from trainer.report.metrics import Row, epoch_rows, read_rows
from trainer.report.summary import reported_row
from trainer.run.atomic import write_text_atomically
from trainer.run.versions import describe_versions

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# 97.5 % quantiles of Student's t distribution with 1 to 30 degrees of freedom.
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131,
    2.120, 2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
_ROUNDING = 1e-9
"""Tolerance for the rounding error of a mean accuracy: equal accuracies must reach their own mean."""
_COLUMNS = ("accuracy", "epochs", "time [s]", "ex/s", "to first", "share")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run of a strategy."""

    seed: int
    accuracy: float
    """Reported test accuracy: of the selected epoch if there is a selection split, else of the last epoch."""
    curve: tuple[tuple[float, float], ...]
    """(training seconds, test accuracy) after each epoch, and before the first update if that was evaluated."""
    epochs: int
    rate: float
    """Training examples per second, end to end."""

    @property
    def seconds(self) -> float:
        """Return the training time, with the fit of a linear probe, without evaluation and checkpoints."""
        return self.curve[-1][0]

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the training time until the test accuracy first reached `accuracy`, or None if it never did."""
        return next((t for t, value in self.curve if value >= accuracy - _ROUNDING), None)


def trial_of(rows: list[Row], *, seed: int, selection: str | None, select_by: SelectBy = "accuracy") -> Trial:
    """Return the trial that the metrics rows of a finished run describe."""
    seconds = 0.0
    curve = []
    for row in rows:
        if row["kind"] in ("start", "epoch"):
            seconds += row.get("seconds", 0.0)
            curve.append((seconds, row["test_accuracy"]))
    epochs = epoch_rows(rows)
    return Trial(
        seed=seed,
        accuracy=reported_row(epochs, selection, select_by)["test_accuracy"],
        curve=tuple(curve),
        epochs=len(epochs),
        rate=sum(row["train_seen"] for row in epochs) / sum(row["seconds"] for row in epochs),
    )


def read_trial(folder: Path, *, seed: int, selection: str | None, select_by: SelectBy = "accuracy") -> Trial:
    """Return the trial of a finished run, from its metrics.jsonl."""
    return trial_of(read_rows(folder), seed=seed, selection=selection, select_by=select_by)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """Summary statistics of one strategy over its seeds; the field names are keys of `compare.json`."""

    strategy: str
    trials: tuple[Trial, ...]
    """Trials of the seeds whose run finished."""
    failures: Mapping[int, str]
    """Seed -> error message of the runs that failed."""
    accuracy: float | None
    """Mean test accuracy over seeds; None if no run finished."""
    half_width: float | None
    """Half the width of the 95 % confidence interval of `accuracy`; None for fewer than two seeds."""
    seconds: float | None
    """Mean training time."""
    rate: float | None
    """Mean number of training examples per second."""
    to_first: float | None
    """Mean training time to the first strategy's mean accuracy; None if a seed did not reach it."""
    reached: int
    """Number of seeds that reached the first strategy's mean accuracy."""
    share: float | None
    """`to_first` divided by the first strategy's training time."""


def confidence_half_width(values: Sequence[float]) -> float | None:
    """Return half the width of the 95 % confidence interval of the mean (Student's t); None for fewer than two values.

    More than 31 values use the quantile for 31, so that their interval is slightly too wide.
    """
    if len(values) < 2:
        return None
    t = _T_QUANTILES[min(len(values) - 1, len(_T_QUANTILES)) - 1]
    return t * statistics.stdev(values) / math.sqrt(len(values))


def summarize(trials: Mapping[str, Sequence[Trial]], failures: Mapping[str, Mapping[int, str]]) -> tuple[Summary, ...]:
    """Return one summary per strategy, in order; the first strategy is the reference for the others."""
    reference = next(iter(trials.values()))
    target = statistics.fmean(trial.accuracy for trial in reference) if reference else None
    reference_seconds = statistics.fmean(trial.seconds for trial in reference) if reference else None

    def summarize_one(strategy: str, finished: Sequence[Trial]) -> Summary:
        times = [trial.seconds_to(target) for trial in finished] if target is not None else []
        reached = [time for time in times if time is not None]
        to_first = statistics.fmean(reached) if reached and len(reached) == len(finished) else None
        accuracies = [trial.accuracy for trial in finished]
        return Summary(
            strategy=strategy,
            trials=tuple(finished),
            failures=failures.get(strategy, {}),
            accuracy=statistics.fmean(accuracies) if finished else None,
            half_width=confidence_half_width(accuracies),
            seconds=statistics.fmean(trial.seconds for trial in finished) if finished else None,
            rate=statistics.fmean(trial.rate for trial in finished) if finished else None,
            to_first=to_first,
            reached=len(reached),
            share=to_first / reference_seconds if to_first is not None and reference_seconds else None,
        )

    return tuple(summarize_one(strategy, finished) for strategy, finished in trials.items())


def _format_cells(summary: Summary) -> tuple[str, ...]:
    """Return the text of each column of `_COLUMNS`."""
    if summary.accuracy is None or summary.seconds is None or summary.rate is None:
        return ("failed", *["-"] * (len(_COLUMNS) - 1))
    seeds = len(summary.trials)
    accuracy = f"{summary.accuracy:.3f}" + (f" ± {summary.half_width:.3f}" if summary.half_width is not None else "")
    if summary.failures:
        accuracy += f" ({seeds} of {seeds + len(summary.failures)})"
    return (
        accuracy,
        "/".join(str(n) for n in sorted({trial.epochs for trial in summary.trials})),
        f"{summary.seconds:.1f}",
        format_rate(summary.rate),
        f"- ({summary.reached} of {seeds})" if summary.to_first is None else f"{summary.to_first:.1f}",
        "-" if summary.share is None else f"{summary.share:.2f}",
    )


def _short_reason(failures: Mapping[int, str]) -> str:
    """Return the first clause of the first error message, short enough for a cell."""
    return re.split(r": |\. |\n", next(iter(failures.values()), "no run"), maxsplit=1)[0]


def table(summaries: Sequence[Summary]) -> Table:
    """Return the comparison as a table for 80 columns; `epochs` is a column only if the runs differ in it."""
    comparison = Table(box=SIMPLE_HEAD, pad_edge=False)
    comparison.add_column("strategy", overflow="fold")
    rows = {summary.strategy: _format_cells(summary) for summary in summaries}
    epochs = _COLUMNS.index("epochs")
    epochs_differ = len({cells[epochs] for cells in rows.values()} - {"-"}) > 1
    columns = [i for i in range(len(_COLUMNS)) if i != epochs or epochs_differ]
    for i in columns:
        comparison.add_column(_COLUMNS[i], justify="right", no_wrap=True)
    for strategy, cells in rows.items():
        comparison.add_row(strategy, *(cells[i] for i in columns))
    return comparison


def notes(summaries: Sequence[Summary]) -> list[str]:
    """Return lines that explain the columns, and one line per failed run."""
    first = summaries[0]
    seeds = max(len(summary.trials) for summary in summaries)
    of_what = "mean over seeds ± 95 % confidence interval (Student's t)" if seeds > 1 else "one seed, no interval"
    lines = [
        f"accuracy: test accuracy, {of_what}; "
        "time: training seconds, with the fit of a linear probe, without evaluation and checkpoints"
    ]
    if first.accuracy is not None:
        lines.append(
            f"to first: training seconds until the test accuracy reaches {first.accuracy:.3f}, the mean final accuracy "
            f"of {first.strategy} (-: not reached with every seed); share: the same divided by {first.strategy}'s time"
        )
    lines += [
        f"{summary.strategy}, seed {seed} failed: {message.partition(chr(10))[0]}"
        for summary in summaries
        for seed, message in summary.failures.items()
    ]
    return lines


def markdown(summaries: Sequence[Summary], *, command: str, facts: Sequence[str]) -> str:
    """Return the comparison as a Markdown file."""
    lines = ["# Comparison of strategies", "", "```sh", command, "```", ""]
    lines += [*(f"- {fact}" for fact in facts), ""]
    lines += ["| strategy | " + " | ".join(_COLUMNS) + " |", "| --- |" + " ---: |" * len(_COLUMNS)]
    for summary in summaries:
        accuracy, *others = _format_cells(summary)
        if not summary.trials:
            accuracy += f": {_short_reason(summary.failures)}"
        cells = (summary.strategy, accuracy, *others)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join([*lines, "", *(f"- {note}" for note in notes(summaries)), ""])


def draw_comparison(summaries: Sequence[Summary], figure: "Figure", *, title: str) -> None:
    """Draw test accuracy over training seconds: per strategy the mean over seeds and a band from minimum to maximum.

    If the seeds have different numbers of epochs, a curve ends with the shortest run.
    """
    axes = figure.add_subplot()
    for number, summary in enumerate(summaries):
        if not summary.trials:
            continue
        epochs = list(zip(*(trial.curve for trial in summary.trials), strict=False))
        times = [statistics.fmean(time for time, _ in epoch) for epoch in epochs]
        accuracies = [[accuracy for _, accuracy in epoch] for epoch in epochs]
        means, low, high = ([statistic(a) for a in accuracies] for statistic in (statistics.fmean, min, max))
        color = f"C{number % 10}"
        axes.plot(times, means, "-o", markersize=3, color=color, label=summary.strategy)
        axes.fill_between(times, low, high, color=color, alpha=0.15, linewidth=0)
    first = summaries[0]
    if first.accuracy is not None:
        axes.axhline(first.accuracy, color="C0", linestyle=":", linewidth=1)
    axes.set(xlabel="training [s]", ylabel="test accuracy")
    axes.set_xlim(left=0)
    set_title(axes, title)
    axes.grid(alpha=0.3)
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        legend = axes.legend(handles, labels, fontsize=8, frameon=False, loc="best")
        for text in legend.get_texts():
            text.set_parse_math(False)


def write_comparison(
    path: Path,
    summaries: Sequence[Summary],
    *,
    command: str,
    facts: Sequence[str],
    title: str,
    warn: Callable[[str], object],
) -> None:
    """Write the comparison as `PATH.md`, `PATH.json` and `PATH.png`; `warn` is told why there is no picture.

    `facts` are lines about the runs; the versions of the packages are added to them.

    Raises:
        UserError: a file cannot be written.

    """
    facts = [*facts, describe_versions()]
    content = {"command": command, "facts": facts, "strategies": [asdict(s) for s in summaries]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(path.with_suffix(".md"), markdown(summaries, command=command, facts=facts))
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_text_atomically(path.with_suffix(".json"), text)
    except OSError as error:
        raise UserError(
            f"run.dir {path.parent}: cannot be written to ({error.strerror}). Make room: the runs are finished, and "
            "the same command writes their comparison"
        ) from None
    draw = partial(draw_comparison, summaries, title=title)
    try_write_figure(path.with_suffix(".png"), draw, size=(7.0, 4.4), warn=warn)
