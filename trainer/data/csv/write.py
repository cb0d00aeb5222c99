"""Write a dataset as a CSV file with one row per image: its path, its label and its split."""

# Creating a Path for each of a million rows would take longer than writing them.
# ruff: noqa: PTH109, PTH118

import csv
import os
from collections.abc import Iterable
from pathlib import Path

from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

COLUMNS = ("path", "label", "split")
"""Columns of the CSV, in order."""


def write_table(file: Path, rows: Iterable[tuple[str, str, str]], *, root: Path | None = None) -> None:
    """Write rows of (path, label, split) as a CSV that `read_table` reads unchanged.

    Paths below `root`, by default the folder of the CSV, are written relative to it, all others as absolute paths.
    Every field is quoted, so that commas, quotes, spaces and line ends in names are preserved.

    Raises:
        UserError: the file cannot be written.

    """
    cwd = os.getcwd()
    folder = os.path.join(cwd, root or file.parent, "")

    def relative_if_inside(path: str) -> str:
        absolute = path if path.startswith("/") else os.path.join(cwd, path)
        return absolute[len(folder) :].lstrip("/") if absolute.startswith(folder) else absolute

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(COLUMNS)
            writer.writerows((relative_if_inside(path), label, split) for path, label, split in rows)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(file))}: the split cannot be written ({error.strerror})") from None
