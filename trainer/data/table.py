"""Read and write a dataset as a CSV file with the columns path, label and optionally split."""

# Creating a Path for each of a million rows would take longer than reading them.
# ruff: noqa: PTH109, PTH116, PTH118

import csv
import os
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple, TextIO

from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable, join_truncated

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Name of a split in a folder or CSV, in lower case -> train, val or test."""

_COLUMNS = ("path", "label", "split")
_MAX_LINE_LENGTH = 1 << 20  # characters; a file without line ends is not a table and is not read to its end
_MAX_PROBLEMS_SHOWN = 10


class Row(NamedTuple):
    """One image of the CSV."""

    path: str
    """Path from the row, joined to the folder of the CSV."""
    label: str
    split: str | None
    """train, val or test; None if the CSV has no column `split`."""


def read_table(file: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a CSV in file order, and notes for the user.

    Raises:
        UserError: not a CSV of this form, or invalid rows: a missing file, an empty label, an unknown split, an
            image listed twice. Each is listed with its line number.

    """
    try:
        # Bytes that are not UTF-8 are kept, because file names may contain them. Other columns are checked below.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            return _read_rows(file, stream)
    except OSError as error:
        raise UserError(f"{_location(file)}: the file cannot be read ({error.strerror})") from None


def write_table(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write rows of (path, label, split) as a CSV that `read_table` reads unchanged.

    Paths below the folder of the CSV are written relative to it, all others as absolute paths. Every field is
    quoted, so that commas, quotes, spaces and line ends in names are preserved.

    Raises:
        UserError: the file cannot be written.

    """
    cwd = os.getcwd()
    folder = os.path.join(cwd, file.parent, "")

    def relative_if_inside(path: str) -> str:
        absolute = os.path.join(cwd, path)
        return absolute[len(folder) :].lstrip("/") if absolute.startswith(folder) else absolute

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((relative_if_inside(path), label, split) for path, label, split in rows)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(f"{escape_unprintable(str(file))}: the split cannot be written ({error.strerror})") from None


def _read_rows(file: Path, stream: TextIO) -> tuple[list[Row], list[str]]:
    records = _records(file, stream)
    _, header = next(records, (1, []))
    columns, notes = _find_columns(file, header)
    folder = str(file.parent)
    rows: list[Row] = []
    problems = _Problems()
    seen: dict[tuple[int, int], list[tuple[int, Row]]] = {}  # device and inode -> lines and rows
    for line, fields in records:
        if len(fields) != len(header):
            problems.add(line, f"{len(fields)} fields, expected {len(header)} as in the header")
            continue
        path, label = (fields[columns[name]] for name in ("path", "label"))
        if _has_invalid_utf8(label):
            raise _not_utf8_error(file, line)
        if not label.strip():
            problems.add(line, "the label is empty")
        split = None
        if "split" in columns:
            field = fields[columns["split"]]
            split = SPLIT_NAMES.get(field.strip().lower())
            if split is None:
                problems.add(line, f"the split is '{escape_unprintable(field)}', expected train, val or test")
        row = Row(os.path.join(folder, path), label, split)
        identity = _identity(row.path) if path else None
        if identity is None:
            problems.add(line, _missing_file_reason(path, row.path))
            continue
        same_inode = seen.setdefault(identity, [])
        for earlier_line, earlier in same_inode:
            if _is_same_file(earlier.path, row.path):
                problems.add(
                    line,
                    f"{escape_unprintable(path)} is already on line {earlier_line}{_describe_conflict(earlier, row)}",
                )
                break
        same_inode.append((line, row))
        rows.append(row)
    problems.raise_if_any(file)
    if not rows:
        raise UserError(f"{_location(file)}: there are no rows after the header")
    _check_labels(file, {row.label for row in rows})
    return rows, notes


def _missing_file_reason(path: str, joined: str) -> str:
    if not path:
        return "the path is empty"
    hint = " (its name is not UTF-8: was the CSV saved as UTF-8?)" if _has_invalid_utf8(path) else ""
    return f"no such file: {escape_unprintable(joined)}{hint}"


def _describe_conflict(earlier: Row, row: Row) -> str:
    """Return how two rows of one image contradict each other."""
    if earlier.split != row.split:
        return f" with split {earlier.split}, here {row.split}"
    return f" with label {escape_unprintable(earlier.label)}" if earlier.label != row.label else ""


def _check_labels(file: Path, labels: set[str]) -> None:
    """Raise a UserError for labels that differ only in spaces: one class would silently become two."""
    stripped: dict[str, str] = {}
    for label in sorted(labels):
        other = stripped.setdefault(label.strip(), label)
        if other != label:
            raise UserError(
                f"{_location(file)}: the labels '{escape_unprintable(other)}' and '{escape_unprintable(label)}' differ "
                "only in spaces; use one of them"
            )


def _records(file: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line number of the record, fields); skip blank lines."""

    def checked() -> Iterator[str]:
        for number, text in enumerate(_lines(stream), start=1):
            if "\0" in text:
                raise UserError(
                    f"{_location(file, number)}: a NUL byte, so this is not a CSV in UTF-8. "
                    "Expected a folder (extract an archive first) or a CSV with the header path,label or "
                    "path,label,split; in a spreadsheet program, save it as 'CSV UTF-8'"
                )
            if len(text) > _MAX_LINE_LENGTH:
                raise UserError(
                    f"{_location(file, number)}: more than {_MAX_LINE_LENGTH:,} characters, "
                    "so this is not a CSV of images. Expected the header path,label or path,label,split"
                )
            yield text

    reader = csv.reader(checked(), strict=True, skipinitialspace=True)
    first_line = 1
    try:
        for fields in reader:
            if fields:
                yield first_line, fields
            first_line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{_location(file, first_line)}: not a row of a CSV ({error}). Enclose a field that "
            'contains a comma, a quote or a line end in "...", and double the quotes in it'
        ) from None


def _lines(stream: TextIO) -> Iterator[str]:
    return iter(lambda: stream.readline(_MAX_LINE_LENGTH + 1), "")


def _find_columns(file: Path, header: list[str]) -> tuple[dict[str, int], list[str]]:
    """Return column name -> position, and notes for the user."""
    names = [name.strip().lower() for name in header]
    if any(_has_invalid_utf8(name) for name in names):
        raise _not_utf8_error(file, 1)
    found = {name: names.index(name) for name in _COLUMNS if name in names}
    duplicates = sorted({name for name in found if names.count(name) > 1})
    if "path" not in found or "label" not in found or duplicates:
        first_line = join_truncated(header, limit=6)[:200] or "empty"
        raise UserError(
            f"{_location(file)}: expected a CSV with the header path,label or path,label,split, "
            f"separated by commas; its first line is {first_line}"
            + (f"; duplicate columns: {', '.join(duplicates)}" if duplicates else "")
        )
    others = [name for name in names if name not in found]
    notes = [f"columns of {escape_unprintable(file.name)} that are ignored: {join_truncated(others)}"] if others else []
    return found, notes


class _Problems:
    """Invalid rows: all are counted, the first are kept for the message."""

    def __init__(self) -> None:
        self._count, self._first = 0, list[str]()

    def add(self, line: int, text: str) -> None:
        self._count += 1
        if self._count <= _MAX_PROBLEMS_SHOWN:
            self._first.append(f"\n  line {line}: {text}")

    def raise_if_any(self, file: Path) -> None:
        """Raise a UserError that lists the problems."""
        if not self._count:
            return
        more = f"\n  and {self._count - _MAX_PROBLEMS_SHOWN} more" if self._count > _MAX_PROBLEMS_SHOWN else ""
        raise UserError(
            f"{_location(file)}: {self._count} problem{'s' * (self._count > 1)} in the rows:"
            f"{''.join(self._first)}{more}\nEach row needs the path of an image (absolute, or relative to "
            "the folder of the CSV) and its label; the column split must be train, val or test; no image twice"
        )


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a regular file, or None if there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _is_same_file(one: str, other: str) -> bool:
    """Return whether two paths with the same inode are one file.

    Hard links count as different files, because a tool may have merged equal files. Some network file systems
    also have inode numbers that are not unique.
    """
    return os.path.realpath(one) == os.path.realpath(other)


def _has_invalid_utf8(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def _not_utf8_error(file: Path, line: int) -> UserError:
    return UserError(
        f"{_location(file, line)}: not UTF-8. Save the CSV as UTF-8 (in a spreadsheet program: 'CSV UTF-8')"
    )


def _location(file: Path, line: int | None = None) -> str:
    """Return the location of an error for a message."""
    return f"data.root {escape_unprintable(str(file))}" + (f", line {line}" if line else "")
