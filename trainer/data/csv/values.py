"""Find what the columns of a CSV mean by their values: splits, flags such as is_valid, one column for each class."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from trainer.data.split_names import SplitKind, split_kind

Counts = Mapping[int, Counter[str]]
"""Position of a column -> number of rows for each value, in lower case; columns with many values are missing."""

_TRUE = frozenset({"1", "1.0", "true", "t", "yes", "y"})
_FALSE = frozenset({"0", "0.0", "-1", "false", "f", "no", "n"})
_FLAG = re.compile(
    r"(?:is|in|for)?(?:(?P<train>train(?:ing)?)|(?P<val>val(?:id|idation)?)|(?P<test>test(?:ing)?))(?:set|img|image)?"
)
_SPLITS: tuple[SplitKind, ...] = ("train", "val", "test")
_MAX_VALUES = 12
"""Number of different values up to which a column may hold splits."""
_MIN_RATIO = 1.2
"""Ratio of the largest to the smallest of three numbered splits; folds of a cross-validation are of equal size."""


@dataclass(frozen=True, kw_only=True)
class SplitColumns:
    """The columns that say the split of a row."""

    names: int | None = None
    """Column that holds names or numbers of splits."""
    numbers: Mapping[str, SplitKind] = field(default_factory=dict)
    """Split that a number means."""
    flags: Mapping[int, SplitKind] = field(default_factory=dict)
    """Column such as is_valid -> split of the rows in which it is true."""

    def read(self, fields: Sequence[str]) -> SplitKind | None:
        """Return the split of a row, or None if its values say none."""
        if self.names is not None:
            value = fields[self.names].strip()
            return self.numbers.get(value) or split_kind(value)
        marked = [kind for position, kind in self.flags.items() if is_true(fields[position])]
        if len(marked) == 1:
            return marked[0]
        rest: SplitKind = "test" if "train" in self.flags.values() else "train"
        return None if marked else rest

    def show(self, fields: Sequence[str]) -> str:
        """Return the values of a row."""
        return fields[self.names] if self.names is not None else ", ".join(fields[position] for position in self.flags)

    def describe(self, header: Sequence[str]) -> str | None:
        """Return a note if the values are not the names of splits."""
        meanings = [f"{number} is {kind}" for number, kind in self.numbers.items()]
        meanings += [f"{header[position].strip()} marks {kind}" for position, kind in self.flags.items()]
        return f"splits of the CSV: {', '.join(meanings)}" if meanings else None

    @property
    def positions(self) -> set[int]:
        """Return the positions of the columns."""
        return {*self.flags} if self.names is None else {self.names}


def fit_fields(record: list[str], count: int) -> list[str] | None:
    """Return the first `count` fields of a row; None if it has fewer, or others that are not empty."""
    if len(record) == count:
        return record
    return record[:count] if len(record) > count and not any(map(str.strip, record[count:])) else None


def count_values(rows: Iterable[Sequence[str]], positions: Iterable[int]) -> Counts:
    """Return how often each value of these columns occurs, for those with few values."""
    counts: dict[int, Counter[str]] = {position: Counter() for position in positions}
    for fields in rows:
        for position, values in [*counts.items()]:
            values[fields[position]] += 1
            if len(values) > _MAX_VALUES:
                del counts[position]
        if not counts:
            break
    return {position: _merge(values) for position, values in counts.items()}


def _merge(counts: Counter[str]) -> Counter[str]:
    """Return the counts of the values in lower case, without spaces."""
    merged = Counter[str]()
    for value, count in counts.items():
        merged[value.strip().lower()] += count
    return merged


def read_split_column(position: int, name: str, counts: Counter[str] | None) -> SplitColumns | None:
    """Return how a column that is named for the split is read, or None if its values are no splits."""
    kind = _flag_kind(name)
    if counts and any(map(split_kind, counts)):
        return SplitColumns(names=position)
    if counts and (numbers := _numbered_splits(counts)):
        return SplitColumns(names=position, numbers=numbers)
    return SplitColumns(flags={position: kind}) if kind and counts and _is_flag(counts) else None


def find_split_columns(header: Sequence[str], used: set[int], counts: Counts) -> list[SplitColumns]:
    """Return the other columns whose values can only be splits: one that names them, or flags such as is_valid."""
    found = []
    flags: dict[int, SplitKind] = {}
    for position, values in counts.items():
        if position in used or not values:
            continue
        kinds = {split_kind(value) for value in values if value}
        if None not in kinds and "train" in kinds and len(kinds) > 1:
            found.append(SplitColumns(names=position))
        kind = _flag_kind(header[position])
        if kind and _is_flag(values) and not ("valid" in header[position].lower() and _is_mostly_true(values)):
            flags[position] = kind
    if flags and len(set(flags.values())) == len(flags):
        found.append(SplitColumns(flags=flags))
    return found


def find_class_columns(used: set[int], counts: Counts) -> list[int]:
    """Return the columns that hold 0 and 1 alone, as those of one-hot labels do; empty if there are fewer than two."""
    others = [(position, values) for position, values in counts.items() if position not in used and values]
    columns = [position for position, values in others if {*values} <= _TRUE | _FALSE]
    return columns if len(columns) > 1 else []


def is_true(value: str) -> bool:
    """Return whether a value means yes."""
    return value.strip().lower() in _TRUE


def _is_flag(counts: Counter[str]) -> bool:
    return 0 < _count_true(counts) < counts.total() and {*counts} <= _TRUE | _FALSE


def _count_true(counts: Counter[str]) -> int:
    return sum(count for value, count in counts.items() if is_true(value))


def _is_mostly_true(counts: Counter[str]) -> bool:
    """Return whether at least half of the rows are true: is_valid then means that an image is not damaged."""
    return 2 * _count_true(counts) >= counts.total()


def _flag_kind(name: str) -> SplitKind | None:
    match = _FLAG.fullmatch(re.sub(r"[\W_]+", "", name.lower()))
    return next(kind for kind in _SPLITS if match[kind]) if match else None


def _numbered_splits(counts: Counter[str]) -> dict[str, SplitKind]:
    """Return number -> split for the numbers 0, 1, 2 or 1, 2, 3 of train, val, test, as in CelebA; else empty."""
    numbers = {re.sub(r"\.0$", "", value): value for value in counts}
    if "".join(sorted(numbers)) not in {"012", "123"} or max(counts.values()) < _MIN_RATIO * min(counts.values()):
        return {}
    return {numbers[number]: kind for number, kind in zip(sorted(numbers), _SPLITS, strict=True)}
