"""A data set as a CSV of `path,label` and, if given, `split`: read row by row, and written."""

# A Path for each of a million rows takes longer than reading them.
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

PARTS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
"""Word for a part, lower case -> the part."""

_COLUMNS = ("path", "label", "split")
_LONGEST_LINE = 1 << 20  # characters: a file without line ends, which is no table, is not read to its end
_SHOWN = 10


class Row(NamedTuple):
    """One image of the table."""

    path: str
    """As `os.path.join(folder of the CSV, what stands in the row)`."""
    label: str
    part: str | None
    """train, val or test; None where the table has no column `split`."""


def read_table(file: Path) -> tuple[list[Row], list[str]]:
    """Return the rows of a CSV in their order, and notes for a reader.

    Raises:
        UserError: not such a table, or rows that cannot be used: a missing file, an empty label, an unknown
            part, an image listed twice. Each is named with its line.

    """
    try:
        # Bytes that are no UTF-8 are kept: a file's name may hold them. Elsewhere they are refused below.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            return _read(file, stream)
    except OSError as error:
        raise UserError(f"{_at(file)}: the file cannot be read ({error.strerror})") from None


def write_table(file: Path, rows: Iterable[tuple[str, str, str]]) -> None:
    """Write (path, label, part) as a CSV that `read_table` reads to the same rows.

    Paths in or below the CSV's folder are written relative to it, the others absolute. Every field is
    quoted, so that commas, quotes, spaces and line ends in names survive.

    Raises:
        UserError: the file cannot be written.

    """
    here = os.getcwd()
    folder = os.path.join(here, file.parent, "")

    def portable(path: str) -> str:
        absolute = os.path.join(here, path)
        return absolute[len(folder) :].lstrip("/") if absolute.startswith(folder) else absolute

    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
            writer = csv.writer(stream, quoting=csv.QUOTE_ALL, lineterminator="\n")
            writer.writerow(_COLUMNS)
            writer.writerows((portable(path), label, part) for path, label, part in rows)

    try:
        write_atomically(file, write)
    except OSError as error:
        raise UserError(
            f"{escape_unprintable(str(file))}: the split cannot be written ({error.strerror})"
        ) from None


def _read(file: Path, stream: TextIO) -> tuple[list[Row], list[str]]:
    records = _records(file, stream)
    _, header = next(records, (1, []))
    columns, notes = _columns(file, header)
    folder = str(file.parent)
    rows: list[Row] = []
    problems = _Problems()
    places: dict[tuple[int, int], list[tuple[int, Row]]] = {}
    for line, fields in records:
        if len(fields) != len(header):
            problems.add(line, f"{len(fields)} fields, expected {len(header)} as in the header")
            continue
        path, label = (fields[columns[name]] for name in ("path", "label"))
        if _not_utf8(label):
            raise _encoding(file, line)
        if not label.strip():
            problems.add(line, "the label is empty")
        part = None
        if "split" in columns:
            word = fields[columns["split"]]
            part = PARTS.get(word.strip().lower())
            if part is None:
                problems.add(line, f"the split is '{escape_unprintable(word)}', expected train, val or test")
        row = Row(os.path.join(folder, path), label, part)
        identity = _identity(row.path) if path else None
        if identity is None:
            problems.add(line, _missing(path, row.path))
            continue
        others = places.setdefault(identity, [])
        for earlier_line, earlier in others:
            if _same(earlier.path, row.path):
                problems.add(
                    line,
                    f"{escape_unprintable(path)} is on line {earlier_line} already{_conflict(earlier, row)}",
                )
                break
        others.append((line, row))
        rows.append(row)
    problems.stop(file)
    if not rows:
        raise UserError(f"{_at(file)}: no row follows the header")
    _check_labels(file, {row.label for row in rows})
    return rows, notes


def _missing(path: str, joined: str) -> str:
    if not path:
        return "the path is empty"
    hint = " (its name is not UTF-8: was the CSV saved as UTF-8?)" if _not_utf8(path) else ""
    return f"no such file: {escape_unprintable(joined)}{hint}"


def _conflict(earlier: Row, row: Row) -> str:
    """Return how two rows of one image contradict each other, for a reader."""
    if earlier.part != row.part:
        return f", in {earlier.part}, and here in {row.part}"
    return f", as {escape_unprintable(earlier.label)}" if earlier.label != row.label else ""


def _check_labels(file: Path, labels: set[str]) -> None:
    """Raise a UserError for labels that only spaces tell apart: one class would silently become two."""
    stripped: dict[str, str] = {}
    for label in sorted(labels):
        other = stripped.setdefault(label.strip(), label)
        if other != label:
            raise UserError(
                f"{_at(file)}: the labels '{escape_unprintable(other)}' and '{escape_unprintable(label)}' differ in "
                "spaces only; write one of them"
            )


def _records(file: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    """Yield (line that the record begins on, its fields); blank lines are left out."""

    def checked() -> Iterator[str]:
        for number, text in enumerate(_lines(stream), start=1):
            if "\0" in text:
                raise UserError(
                    f"{_at(file, number)}: a NUL byte, so this is no CSV in UTF-8. "
                    "Expected a folder (an archive has to be unpacked first) or a text table with the header "
                    "path,label or path,label,split; from a spreadsheet, save it as 'CSV UTF-8'"
                )
            if len(text) > _LONGEST_LINE:
                raise UserError(
                    f"{_at(file, number)}: more than {_LONGEST_LINE:,} characters, "
                    "so this is no CSV of images. Expected the header path,label or path,label,split"
                )
            yield text

    reader = csv.reader(checked(), strict=True, skipinitialspace=True)
    begins = 1
    try:
        for fields in reader:
            if fields:
                yield begins, fields
            begins = reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{_at(file, begins)}: not a row of a CSV ({error}). A field that holds a "
            'comma, a quote or a line end stands in "...", and a quote in it is doubled'
        ) from None


def _lines(stream: TextIO) -> Iterator[str]:
    return iter(lambda: stream.readline(_LONGEST_LINE + 1), "")


def _columns(file: Path, header: list[str]) -> tuple[dict[str, int], list[str]]:
    names = [name.strip().lower() for name in header]
    if any(_not_utf8(name) for name in names):
        raise _encoding(file, 1)
    found = {name: names.index(name) for name in _COLUMNS if name in names}
    twice = sorted({name for name in found if names.count(name) > 1})
    if "path" not in found or "label" not in found or twice:
        seen = join_truncated(header, limit=6)[:200] or "nothing"
        raise UserError(
            f"{_at(file)}: expected a CSV with the header path,label or path,label,split, "
            f"separated by commas; its first line holds {seen}"
            + (f"; twice: {', '.join(twice)}" if twice else "")
        )
    others = [name for name in names if name not in found]
    notes = (
        [f"columns of {escape_unprintable(file.name)} that are not used: {join_truncated(others)}"]
        if others
        else []
    )
    return found, notes


class _Problems:
    """Rows that cannot be used; the first are kept, all are counted."""

    def __init__(self) -> None:
        self._count, self._first = 0, list[str]()

    def add(self, line: int, text: str) -> None:
        self._count += 1
        if self._count <= _SHOWN:
            self._first.append(f"\n  line {line}: {text}")

    def stop(self, file: Path) -> None:
        """Raise a UserError if there were any."""
        if not self._count:
            return
        more = f"\n  and {self._count - _SHOWN} more" if self._count > _SHOWN else ""
        raise UserError(
            f"{_at(file)}: {self._count} problem{'s' * (self._count > 1)} in its rows:"
            f"{''.join(self._first)}{more}\nExpected in each row the path of an image (relative to the CSV's "
            "folder, or absolute), its label, and, in a column split, train, val or test; no image twice"
        )


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a regular file; None: there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None


def _same(one: str, other: str) -> bool:
    """Return whether two paths of one inode are one file.

    Hard links are not: a tool may have merged equal files. Nor is every file of a network folder that
    counts its inodes badly.
    """
    return os.path.realpath(one) == os.path.realpath(other)


def _not_utf8(text: str) -> bool:
    return any("\udc80" <= character <= "\udcff" for character in text)


def _encoding(file: Path, line: int) -> UserError:
    return UserError(
        f"{_at(file, line)}: not UTF-8. Save the table as UTF-8 (from a spreadsheet: 'CSV UTF-8')"
    )


def _at(file: Path, line: int | None = None) -> str:
    """Return where an error is, for a reader."""
    return f"data.root {escape_unprintable(str(file))}" + (f", line {line}" if line else "")
