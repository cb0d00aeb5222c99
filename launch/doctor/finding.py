"""What the doctor checks, and the result of a check."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True)
class Finding:
    """One result of a check."""

    check: str
    """Name of the check."""
    level: Level
    """green: good; yellow: works, but slowly or not for long; red: a run would fail."""
    message: str
    """What was found."""
    remedy: str | None = None
    """What to do about it; None if the level is green."""


def make_finding(check: str, level: Level, message: str, remedy: str) -> Finding:
    """Return a finding; the remedy is dropped if the level is green."""
    return Finding(check, level, message, None if level == "green" else remedy)


@dataclass(kw_only=True)
class DoctorContext:
    """What is checked, and what earlier checks have measured for later ones."""

    run: Path
    """The run folder, which may not exist yet."""
    processes: int
    """Number of processes per node."""
    nodes: int
    """Number of nodes."""
    options: tuple[str, ...]
    """Command-line options of the trainer."""
    scratch: Path | None = None
    """Folder of the doctor on the run folder's disk, None if it could not be made."""
    measured: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What trainer/commands/probe.py has measured: name -> values, or an `error`."""


def format_bytes(count: float) -> str:
    """Return a number of bytes with a short unit."""
    for unit, factor in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= factor:
            return f"{count / factor:.3g} {unit}" if count < 1000 * factor else f"{count / factor:,.0f} {unit}"
    return f"{count:.0f} bytes"
