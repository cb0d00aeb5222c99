"""Read a dataset from a CSV file with one row per image: its path, its label, and optionally its split."""

# Creating a Path for each of a million rows would take longer than reading them.

import itertools
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from trainer.data.csv.columns import columns_error, describe_columns, find_columns
from trainer.data.csv.images import ImageFiles
from trainer.data.csv.records import check_utf8, location, read_records
from trainer.data.csv.values import (
    Counts,
    SplitColumns,
    count_values,
    find_class_columns,
    find_split_columns,
    fit_fields,
    is_true,
    read_split_column,
)
from trainer.data.csv.write import COLUMNS, GROUP_COLUMNS
from trainer.data.split_names import split_kind
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_MAX_PROBLEMS_SHOWN = 10
_MISSING = frozenset({"nan", "<na>", "#n/a", "#name?", "#ref!", "#value!"})
"""Labels that pandas and spreadsheet programs write for a missing value or an error."""


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
        folder = file.parent / Path(self.root).expanduser() if self.root else file.parent
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
    columns, notes = _find_columns(file, table)
    files = ImageFiles(str(table.folder(file)), suffix=table.suffix or "", search=table.root is not None)
    is_ours = _is_written_table(file)
    rows: list[Row] = []
    problems = _Problems()
    seen = _SeenFiles()
    unlabeled = 0
    for line, record in itertools.islice(read_records(file), 1, None):
        fields = fit_fields(record, len(columns.header))
        if fields is None:
            problems.add(line, f"{len(record)} fields, expected {len(columns.header)} as in the header")
            continue
        name, label, split = fields[columns.roles["path"]], columns.label(fields), None
        check_utf8(label, file, line)
        if columns.splits:
            split = columns.splits.read(fields)
            if split == "unlabeled":
                unlabeled += 1
                continue
            if split is None:
                shown = escape_unprintable(columns.splits.show(fields))
                problems.add(line, f"the split is '{shown}', expected train, val or test")
        if reason := _find_label_problem(label, may_be_nan=is_ours):
            problems.add(line, reason)
        try:
            path, identity = files.find(name)
        except FileNotFoundError as error:
            problems.add(line, str(error), missing=name)
            continue
        row = Row(path, label, split, fields[columns.roles["group"]] if "group" in columns.roles else None)
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


class _Columns(NamedTuple):
    """The columns of a CSV that are used."""

    header: list[str]
    roles: dict[str, int]
    """path, label, split, group -> position."""
    splits: SplitColumns | None
    classes: list[int]
    """Columns of one-hot labels, if there is no column for the label."""

    def label(self, fields: Sequence[str]) -> str:
        """Return the label of a row."""
        if self.classes:
            return next(self.header[position].strip() for position in self.classes if is_true(fields[position]))
        return fields[self.roles["label"]]

    def describe(self) -> list[str]:
        """Return notes about the columns."""
        used = {*self.roles.values(), *self.classes, *(self.splits.positions if self.splits else ())}
        notes = describe_columns(self.header, self.roles, used)
        if self.splits and (note := self.splits.describe(self.header)):
            notes.append(note)
        if self.classes:
            names = join_truncated(self.header[position].strip() for position in self.classes)
            notes.append(f"columns of the CSV that are classes: {names}")
        return notes


def _find_columns(file: Path, table: TableFormat) -> tuple[_Columns, list[str]]:
    """Return the columns of a CSV, by their names and values, and notes about them."""
    _, header = next(read_records(file), (1, [""]))
    while len(header) > 1 and not header[-1].strip():
        header.pop()
    for name in header:
        check_utf8(name, file, 1)
    roles, is_guess = find_columns(location(file), header, table.columns)
    if {*roles} == {"path", "label"} and len(header) == 2:
        return (columns := _Columns(header, roles, None, [])), columns.describe()
    records = itertools.islice(read_records(file), 1, None)
    rows = filter(None, (fit_fields(record, len(header)) for _, record in records))
    guesses = {roles[role] for role in ("split", "group") if role in roles}
    counts = count_values(rows, {*range(len(header))} - {*roles.values()} | guesses)
    if "group" not in table.columns and all(map(split_kind, counts.get(roles.get("group", -1), {"": 0}))):
        del roles["group"]  # it holds splits
    splits = _find_splits(file, header, roles, counts, is_guess=is_guess)
    columns = _Columns(header, roles, splits, [] if "label" in roles else _find_one_hot(file, header, roles, counts))
    return columns, columns.describe()


def _find_splits(
    file: Path, header: Sequence[str], roles: dict[str, int], counts: Counts, *, is_guess: bool
) -> SplitColumns | None:
    """Return the columns that say the split. Update the one in `roles`, which may be a wrong guess or missing."""
    if "split" in roles:
        position = roles["split"]
        if found := read_split_column(position, header[position], counts.get(position)):
            return found
        if not is_guess:
            return SplitColumns(names=position)
        del roles["split"]
    candidates = find_split_columns(header, {*roles.values()}, counts) if "label" in roles else []
    if len(candidates) > 1:
        names = join_truncated(header[position].strip() for found in candidates for position in found.positions)
        raise columns_error(location(file), header, f"several columns may be the split: {names}")
    for found in candidates:
        if found.names is not None:
            roles["split"] = found.names
        return found
    return None


def _find_one_hot(file: Path, header: Sequence[str], roles: Mapping[str, int], counts: Counts) -> list[int]:
    """Return the columns of the classes if each row marks one; raise a UserError if there are none."""
    classes = find_class_columns({*roles.values()}, counts)
    if not classes:
        raise columns_error(location(file), header, "no column for the label is recognized")
    for line, record in itertools.islice(read_records(file), 1, None):
        fields = fit_fields(record, len(header))
        marked = [header[position].strip() for position in classes if fields and is_true(fields[position])]
        if fields and len(marked) != 1:
            names = join_truncated((header[position].strip() for position in classes), limit=5)
            shown = f" ({join_truncated(marked)})" if marked else ""
            problem = (
                f"no column for the label is recognized. The columns {names} hold 0 and 1, but this row has "
                f"{len(marked)} of these classes{shown}, and an image must have one"
            )
            raise columns_error(location(file, line), header, problem)
    return classes


def _is_written_table(file: Path) -> bool:
    """Return whether `write_table` wrote the file: its labels are names of folders, and one may be `nan`."""
    headers = [(",".join(f'"{name}"' for name in columns) + "\n").encode() for columns in (COLUMNS, GROUP_COLUMNS)]
    with file.open("rb") as stream:
        return stream.readline(max(map(len, headers))) in headers


def _find_label_problem(label: str, *, may_be_nan: bool) -> str | None:
    """Return why a label is not the name of a class, or None if it is one."""
    if not label.strip():
        return "the label consists of spaces" if label else "the label is empty"
    if label.strip().lower() in _MISSING and not may_be_nan:
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
