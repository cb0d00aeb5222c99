"""What a check comes to."""

from dataclasses import asdict, dataclass
from typing import Literal

Level = Literal["green", "yellow", "red"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at."""

    name: str
    """Of the check."""
    level: Level
    """green: as it should be; yellow: works, but slowly or not for long; red: a run would fail."""
    what: str
    remedy: str | None = None
    """What to do about it."""

    def fields(self) -> dict[str, str | None]:
        """Return it as JSON takes it."""
        return asdict(self)


def green(name: str, what: str) -> Finding:
    """Return a finding of what is as it should be."""
    return Finding(name=name, level="green", what=what)


def yellow(name: str, what: str, remedy: str) -> Finding:
    """Return a finding of what works, but not well."""
    return Finding(name=name, level="yellow", what=what, remedy=remedy)


def red(name: str, what: str, remedy: str) -> Finding:
    """Return a finding of what a run would fail of."""
    return Finding(name=name, level="red", what=what, remedy=remedy)


def size(count: float) -> str:
    """Return bytes in a unit that keeps the number short."""
    for unit, one in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= one:
            return f"{count / one:.3g} {unit}" if count < 1000 * one else f"{count / one:,.0f} {unit}"
    return f"{count:.0f} bytes"
