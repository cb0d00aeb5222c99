"""Read and write a dataset as a CSV file with one row per image: its path, its label, and optionally its split."""

# Creating a Path for each of a million rows would take longer than reading them.
# ruff: noqa: PTH109, PTH118

import csv
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.data.csv_columns import describe_columns, find_columns
from trainer.data.csv_images import ImageFiles
from trainer.data.csv_records import check_utf8, location, read_records
from trainer.data.split_names import split_kind
from trainer.errors import UserError
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

_COLUMNS = ("path", "label", "split")
_MAX_PROBLEMS_SHOWN = 10


@dataclass(frozen=True, kw_only=True)
class TableFormat:
    """How to read a CSV that is not in the form that `write_table` writes."""

    columns: Mapping[str, str] = field(default_factory=dict)
    """path, label, split or group -> name of the column that holds it."""
    root: str | None = None
    """Folder of the images, absolute or relative to the folder of the CSV; None is the folder of the CSV."""
    suffix: str | None = None
    """Extension to add to the paths of the CSV, such as `.jpg`; None adds none."""

    def folder(self, file: Path) -> Path:
        """Return the folder that relative paths of a CSV start from; raises a UserError if there is none."""
        folder = file.parent / self.root if self.root else file.parent
        if not folder.is_dir():
            raise UserError(f"data.csv_root is {escape_unprintable(str(self.root))}: there is no such folder")
        return folder


class Row(NamedTuple):
    """One image of the CSV."""

    path: str
    """Path from the row, joined to the folder of the images."""
    label: str
    split: str | None
    """train, val or test; None if the CSV has no such column."""
    group: str | None = None
    """What several images share that must not be divided between two splits; None if no column is named for it."""


def read_table(file: Path, table: TableFormat | None = None) -> tuple[list[Row], list[str]]:
    """Return the rows of a CSV in file order, and notes for the user.

    Raises:
        UserError: not a CSV, no columns for path and label, or invalid rows: a missing file, an empty label, an unknown
            split, an image listed twice. Each is listed with its line number.

    """
    table = table or TableFormat()
    records = read_records(file)
    _, header = next(records, (1, [""]))
    for name in header:
        check_utf8(name, file, 1)
    columns, split_is_guessed = find_columns(location(file), header, table.columns)
    if split_is_guessed and not _has_split_names(file, columns["split"]):
        del columns["split"]
    notes = describe_columns(header, columns)
    files = ImageFiles(str(table.folder(file)), suffix=table.suffix or "", search=table.root is not None)
    is_ours = _is_written_table(file)
    rows: list[Row] = []
    problems = _Problems()
    seen = _SeenFiles()
    unlabeled = 0
    for line, fields in records:
        if len(fields) != len(header):
            problems.add(line, f"{len(fields)} fields, expected {len(header)} as in the header")
            continue
        values = {role: fields[position] for role, position in columns.items()}
        name, label, split = values["path"], values["label"], None
        check_utf8(label, file, line)
        if "split" in values:
            split = split_kind(values["split"])
            if split == "unlabeled":
                unlabeled += 1
                continue
            if split is None:
                shown = escape_unprintable(values["split"])
                problems.add(line, f"the split is '{shown}', expected train, val or test")
        if reason := _find_label_problem(label, may_be_nan=is_ours):
            problems.add(line, reason)
        try:
            path, identity = files.find(name)
        except FileNotFoundError as error:
            problems.add(line, str(error), missing=name)
            continue
        row = Row(path, label, split, values.get("group"))
        if earlier := seen.find_or_add(identity, line, row):
            conflict = _describe_conflict(earlier[1], row)
            problems.add(line, f"{escape_unprintable(name)} is already on line {earlier[0]}{conflict}")
        rows.append(row)
    problems.raise_if_any(file, files)
    if not rows:
        raise UserError(f"{location(file)}: there are no rows after the header")
    if unlabeled:
        notes.append(f"rows of the CSV whose split has no labels, ignored: {unlabeled}")
    return rows, notes


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


def _has_split_names(file: Path, position: int) -> bool:
    """Return whether a column holds names of splits: one that is named `set` may hold something else."""
    rows = (fields for line, fields in read_records(file) if line > 1)
    return any(position < len(fields) and split_kind(fields[position]) for fields in rows)


def _is_written_table(file: Path) -> bool:
    """Return whether `write_table` wrote the file: its labels are names of folders, and one may be `nan`."""
    expected = (",".join(f'"{name}"' for name in _COLUMNS) + "\n").encode()
    with file.open("rb") as stream:
        return stream.read(len(expected)) == expected


def _find_label_problem(label: str, *, may_be_nan: bool) -> str | None:
    """Return why a label is not the name of a class, or None if it is one."""
    if not label.strip():
        return "the label consists of spaces" if label else "the label is empty"
    if label.strip().lower() == "nan" and not may_be_nan:
        return f"the label is {label.strip()}, which stands for a missing value, not for a class"
    return None


def _describe_conflict(earlier: Row, row: Row) -> str:
    """Return how two rows of one image contradict each other."""
    if earlier.split != row.split:
        return f" with split {earlier.split}, here {row.split}"
    return f" with label {escape_unprintable(earlier.label)}" if earlier.label != row.label else ""


class _Problems:
    """Invalid rows: all are counted, the first are kept for the message."""

    def __init__(self) -> None:
        self._count, self._first, self._missing = 0, list[str](), ""

    def add(self, line: int, text: str, *, missing: str = "") -> None:
        self._count += 1
        self._missing = self._missing or missing
        if self._count <= _MAX_PROBLEMS_SHOWN:
            self._first.append(f"\n  line {line}: {text}")

    def raise_if_any(self, file: Path, files: ImageFiles) -> None:
        """Raise a UserError that lists the problems."""
        if not self._count:
            return
        more = f"\n  and {self._count - _MAX_PROBLEMS_SHOWN} more" if self._count > _MAX_PROBLEMS_SHOWN else ""
        hint = files.hint(self._missing) if self._missing else ""
        raise UserError(
            f"{location(file)}: {self._count} problem{'s' * (self._count > 1)} in the rows:"
            f"{''.join(self._first)}{more}{hint}\nEach row needs the path of an image (absolute, or relative to "
            "the folder of the CSV or data.csv_root) and its label; the column split must be train, val or test; no "
            "image twice"
        )


class _SeenFiles:
    """The files of the rows so far."""

    def __init__(self) -> None:
        self._rows: dict[tuple[int, int], list[tuple[int, Row]]] = {}  # device and inode -> lines and rows

    def find_or_add(self, identity: tuple[int, int], line: int, row: Row) -> tuple[int, Row] | None:
        """Return the line and the row that named the same file before, or add this one and return None.

        Hard links count as different files, because a tool may have merged equal files. Some network file systems
        also have inode numbers that are not unique.
        """
        same_inode = self._rows.setdefault(identity, [])
        for earlier in same_inode:
            if os.path.realpath(earlier[1].path) == os.path.realpath(row.path):
                return earlier
        same_inode.append((line, row))
        return None
