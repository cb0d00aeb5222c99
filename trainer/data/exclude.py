"""Leave out the images that a file names: the option `data.exclude`."""

# Creating a Path for each of a million images would take longer than comparing their names.
# ruff: noqa: PTH100, PTH118

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

from trainer.data.csv.records import read_records
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_COLUMN = "path"
_MAX_LINE = 1 << 16
"""Bytes of a line from which on the file is no list of paths."""


def find_excluded(file: Path, root: Path, paths: Iterable[str]) -> frozenset[str]:
    """Return those of the paths that a file names.

    Args:
        file: a CSV with a column `path`, or a list with one path per line; relative to `root`, or absolute.
        root: folder of the dataset.
        paths: paths of all images.

    Raises:
        UserError: the file cannot be read, or names paths that are no images of the dataset.

    """
    where = describe(file)
    names = dict.fromkeys(_read_paths(file, where))
    requested = {os.path.abspath(os.path.join(root, name)): name for name in names}
    found = {path: absolute for path in paths if (absolute := os.path.abspath(path)) in requested}
    unknown = sorted(requested[path] for path in requested.keys() - found.values())
    if unknown:
        raise UserError(
            f"{where}: {len(unknown)} of its {len(names)} paths are not images of the dataset: "
            f"{join_truncated(unknown, limit=5)}. Expected a CSV with the column path, or a list with one path per "
            f"line, relative to {escape_unprintable(str(root))} or absolute"
        )
    return frozenset(found)


def describe(file: Path) -> str:
    """Return the option and its value for a message."""
    return f"data.exclude {escape_unprintable(str(file))}"


def _read_paths(file: Path, where: str) -> Iterator[str]:
    """Yield the paths that a file names, as they are written."""
    try:
        with file.open("rb") as stream:
            header = next((line for line in iter(lambda: stream.readline(_MAX_LINE + 1), b"") if line.strip()), b"")
            if _COLUMN in _fields(header):
                yield from _read_column(file, where)
                return
            stream.seek(0)
            for number, line in enumerate(iter(lambda: stream.readline(_MAX_LINE + 1), b""), start=1):
                if len(line) > _MAX_LINE or b"\0" in line:
                    raise UserError(
                        f"{where}, line {number}: not the path of an image. Expected a CSV with the column path, or a "
                        "list with one path per line"
                    )
                if line.strip():
                    yield os.fsdecode(line.removeprefix(b"\xef\xbb\xbf" * (number == 1)).rstrip(b"\r\n"))
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror}); expected a CSV or a list of paths") from None


def _fields(header: bytes) -> list[str]:
    """Return the names of the columns, if the line is the header of a CSV."""
    text = header.decode("utf-8-sig", "replace")
    return [field.strip().strip('"').strip().lower() for field in re.split(r"[,;\t|]", text)]


def _read_column(file: Path, where: str) -> Iterator[str]:
    try:
        records = read_records(file)
        _, header = next(records)
        position = [name.strip().lower() for name in header].index(_COLUMN)
        for line, fields in records:
            if len(fields) <= position or not fields[position]:
                raise UserError(f"{where}, line {line}: the path is empty")
            yield fields[position]
    except UserError as error:  # the reader of datasets calls the file data.root
        raise UserError(str(error).replace(f"data.root {escape_unprintable(str(file))}", where, 1)) from None
