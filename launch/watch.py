"""Follow the state of a run: a display that is refreshed on a terminal, otherwise a line for each change."""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

_POLL_SECONDS = 2.0
_HIDE_CURSOR, _SHOW_CURSOR, _CLEAR_BELOW = "\x1b[?25l", "\x1b[?25h", "\x1b[J"


@dataclass(frozen=True, kw_only=True)
class Report:
    """The state of one or several runs."""

    text: str
    """Several lines."""
    summaries: tuple[str, ...]
    """One line for each run."""
    code: int
    """Exit code: 0 while the runs go on or are done, 3 if one has ended before it was done."""
    ended: bool
    """Whether all runs have ended."""


def watch_lines(look: Callable[[], Report], say: Callable[[str], object]) -> int:
    """Print the state of the runs, then a line for each change, and the state at the end; return the exit code."""
    report = look()
    say(report.text)
    while not report.ended:
        time.sleep(_POLL_SECONDS)
        previous, report = report, look()
        if report.ended:
            say(report.text)
            break
        for summary in report.summaries:
            if summary not in previous.summaries:
                say(summary)
    return report.code


def watch_terminal(look: Callable[[], Report]) -> int:
    """Show the state of the runs until all have ended, in place of what was shown before; return the exit code."""
    out, shown, text = sys.stdout, 0, ""
    out.write(_HIDE_CURSOR)
    try:
        while True:
            report = look()
            if report.text != text or report.ended:
                text = report.text
                up = f"\x1b[{shown}F" if shown else ""
                # At the end, all lines, whole.
                lines = text.split("\n") if report.ended else _fit(text)
                out.write(f"{up}{_CLEAR_BELOW}" + "".join(f"{line}\n" for line in lines))
                out.flush()
                shown = len(lines)
            if report.ended:
                return report.code
            time.sleep(_POLL_SECONDS)
    finally:
        out.write(_SHOW_CURSOR)
        out.flush()


def _fit(text: str) -> list[str]:
    """Return the lines that the terminal can show: it would wrap longer ones, and scroll if there were more."""
    size = os.get_terminal_size(sys.stdout.fileno())
    columns, rows = max(20, size.columns), max(2, size.lines)
    lines = text.split("\n")
    if len(lines) >= rows:
        lines = [*lines[: rows - 2], f"... {len(lines) - rows + 2} more lines"]
    return [line if len(line) <= columns else f"{line[: columns - 1]}…" for line in lines]
