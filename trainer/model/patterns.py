"""Names of modules and patterns of parameter names, as options take them."""

from collections.abc import Iterable
from fnmatch import fnmatchcase


def match_names(pattern: str, names: Iterable[str]) -> set[str]:
    """Return the parameter names that a pattern means: those it matches, and all of the modules that it matches.

    `layer4` and `layer4.*` mean the same; `*.bias` means every bias.
    """
    return {name for name in names if fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")}
