"""Match the modules and patterns of parameter names that options contain."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def match_names(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the parameter names that match a pattern, or that belong to a module that matches it.

    `layer4` and `layer4.*` mean the same; `*.bias` means every bias.
    """
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
