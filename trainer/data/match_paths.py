"""Match paths with a regular expression. Runs as a process of its own, which can be killed: see `group_by`.

Standard input: the expression, then the paths. Standard output: the group of each path; empty if it has none. Both are
UTF-8 with surrogates, separated by null bytes. Only the standard library is imported.
"""

import re
import sys


def capturing_group(pattern: re.Pattern[str]) -> int:
    """Return the number of the only named group of a pattern, or of its only group.

    Raises:
        ValueError: there is none, or there are several.

    """
    numbers = list(pattern.groupindex.values()) or list(range(1, pattern.groups + 1))
    if len(numbers) != 1:
        kind = "named groups" if pattern.groupindex else "capturing groups"
        raise ValueError(f"it has {len(numbers)} {kind}")
    return numbers[0]


def main() -> None:
    """Read the expression and the paths, and write the groups."""
    text, *paths = sys.stdin.buffer.read().decode("utf-8", "surrogateescape").split("\0")
    pattern = re.compile(text)
    group = capturing_group(pattern)
    matches = map(pattern.search, paths)
    groups = "\0".join((match[group] or "") if match else "" for match in matches)
    sys.stdout.buffer.write(groups.encode("utf-8", "surrogateescape"))


if __name__ == "__main__":
    main()
