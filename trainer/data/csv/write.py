"""Write a dataset as a CSV file with one row per image: its path, its label and its split."""

# Creating a Path for each of a million rows would take longer than writing them.
# ruff: noqa: PTH109, PTH118

import os
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path

from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

COLUMNS = ("path", "label", "split")
"""Columns of the CSV of a split, in order."""
GROUP_COLUMNS = ("path", "label", "group")
"""Columns of a CSV whose groups no split divides."""
_ROWS = 10_000  # that are formatted at once


def write_table(
    file: Path, rows: Iterable[tuple[str, ...]], *, columns: Sequence[str] = COLUMNS, root: Path | None = None
) -> None:
    """Write rows as a CSV that `read_table` reads unchanged.

    Paths below `root`, by default the folder of the CSV, are written relative to it, all others as absolute paths.
    Every field is quoted, so that commas, quotes, spaces and line ends in names are preserved. Python's csv
    module takes several times as long.

    Args:
        file: the CSV.
        rows: the fields of each row; the first one is the path.
        columns: names of the fields.
        root: folder that relative paths start from.

    Raises:
        UserError: the file cannot be written.

    """
    cwd = os.getcwd()
    parent = root or file.parent
    folder = os.path.join(cwd, "" if parent == Path() else parent, "")

    def with_relative_path(row: tuple[str, ...]) -> tuple[str, ...]:
        path = os.path.join(cwd, row[0])
        return (path[len(folder) :].lstrip("/") if path.startswith(folder) else path, *row[1:])

    def to_text(part: list[tuple[str, ...]]) -> str:
        paths = "\0".join(["", *(row[0] for row in part)])
        if paths.count("\0/") < len(part) or f"\0{folder}" in paths:
            part = [*map(with_relative_path, part)]
        text = _join(part)
        if text.count('"') != 2 * len(columns) * len(part):  # a name has quotes
            text = _join([field.replace('"', '""') for field in row] for row in part)
        return text

    def write(temporary: Path) -> None:
        remaining = iter(rows)
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            stream.write(_join([columns]))
            while part := [*islice(remaining, _ROWS)]:
                stream.write(to_text(part))

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(file))}: cannot be written ({error.strerror})") from None


def _join(table: Iterable[Sequence[str]]) -> str:
    """Return the lines of a CSV with quotes around each field."""
    return '"' + '"\n"'.join(map('","'.join, table)) + '"\n'
