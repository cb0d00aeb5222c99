"""Write a dataset as a CSV file with one row per image: its path, its label and its split."""

# Creating a Path for each of a million rows would take longer than writing them.
# ruff: noqa: PTH109, PTH118

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

COLUMNS = ("path", "label", "split")
"""Columns of the CSV of a split, in order."""
GROUP_COLUMNS = ("path", "label", "group")
"""Columns of a CSV whose groups no split divides."""


def write_table(
    file: Path, rows: Iterable[tuple[str, ...]], *, columns: Sequence[str] = COLUMNS, root: Path | None = None
) -> None:
    """Write rows as a CSV that `read_table` reads unchanged.

    Paths below `root`, by default the folder of the CSV, are written relative to it, all others as absolute paths.
    Every field is quoted, so that commas, quotes, spaces and line ends in names are preserved.

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

    def relative_if_inside(path: str) -> str:
        absolute = path if path.startswith("/") else os.path.join(cwd, path)
        return absolute[len(folder) :].lstrip("/") if absolute.startswith(folder) else absolute

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(columns)
            writer.writerows((relative_if_inside(path), *others) for path, *others in rows)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(file))}: cannot be written ({error.strerror})") from None
