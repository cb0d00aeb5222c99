"""The examples of a dataset, with train, val and test splits.

`val` selects the best epoch and `test` is reported. A single evaluation split is reported. The label of a class is
the same in every split: the position of its name among the sorted training classes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, compress, repeat
from pathlib import Path
from typing import NamedTuple, Self, overload

import numpy as np

from trainer.data.csv.write import write_table
from trainer.errors import UserError
from trainer.text import join_truncated

PURPOSES = {"val": "select the best epoch on", "test": "report on"}
"""Evaluated split -> what its images are for, in messages."""


class Example(NamedTuple):
    """One image and its class."""

    path: str
    label: int
    """Index of the class in `DatasetIndex.classes`."""


class Examples(Sequence[Example]):
    """The examples of a split. One object for all of them takes 70 bytes less for each than a tuple of them."""

    def __init__(self, paths: Sequence[str] = (), labels: np.ndarray | Sequence[int] = ()) -> None:
        """Create the examples; `labels` is int64 [N]."""
        self.paths, self.labels = list(paths), np.asarray(labels, dtype=np.int64)

    @classmethod
    def of_classes(cls, paths: Iterable[Sequence[str]]) -> Self:
        """Return the examples of all classes in order; `paths` has the paths of each."""
        classes = list(paths)
        return cls([*chain.from_iterable(classes)], np.repeat(np.arange(len(classes)), [*map(len, classes)]))

    @classmethod
    def of(cls, pairs: Sequence[tuple[str, int]]) -> "Examples":
        """Return (path, label) pairs as examples."""
        if isinstance(pairs, Examples):
            return pairs
        return cls([path for path, _ in pairs], [label for _, label in pairs])

    @overload
    def __getitem__(self, position: int) -> Example: ...
    @overload
    def __getitem__(self, position: slice) -> "Examples": ...
    def __getitem__(self, position: int | slice) -> "Example | Examples":
        if isinstance(position, slice):
            return Examples(self.paths[position], self.labels[position])
        return Example(self.paths[position], int(self.labels[position]))

    def __iter__(self) -> Iterator[Example]:
        return map(Example, self.paths, self.labels.tolist())

    def __len__(self) -> int:
        return len(self.paths)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Examples | tuple) and tuple(self) == tuple(other)

    __hash__ = None  # type: ignore[assignment]  # it compares equal to a tuple

    def __repr__(self) -> str:
        return f"Examples{tuple(self)}"

    def spread(self, count: int) -> "Examples":
        """Return at most `count` of them, at equal distances, so that they are of all classes if there are enough."""
        count = min(count, len(self))
        positions = np.arange(count) * len(self) // max(1, count)
        return Examples([self.paths[position] for position in positions.tolist()], self.labels[positions])

    def only(self, paths: Collection[str]) -> "Examples":
        """Return those whose path is one of `paths`."""
        return self._where([path in paths for path in self.paths])

    def without(self, paths: Collection[str]) -> "Examples":
        """Return those whose path is none of `paths`."""
        return self._where([path not in paths for path in self.paths])

    def _where(self, is_kept: Sequence[bool]) -> "Examples":
        return Examples([*compress(self.paths, is_kept)], self.labels[np.array(is_kept, dtype=bool)])


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """The examples of a dataset, sorted by class, then in the order of ImageFolder or of the CSV."""

    root: Path
    """Dataset folder, or the folder of the CSV."""
    classes: tuple[str, ...]
    """Names of the training classes, sorted."""
    train: Examples
    val: Examples
    """Examples to select the best epoch on; may be empty."""
    test: Examples
    """Examples to report on."""
    reported: str
    """Description of where the test examples come from."""
    split_made: bool
    """Whether a seeded split was made, which the run must save."""
    notes: tuple[str, ...]
    """Messages about ignored files, missing classes and splits."""
    excluded: Mapping[str, Examples] = field(default_factory=dict)
    """Split -> its examples that the option `data.exclude` leaves out."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Path -> what several images share, such as a patient, for images that have such a group."""

    def with_few_to_evaluate(self, count: int) -> "DatasetIndex":
        """Return the index with at most `count` examples in each evaluated split, spread over the classes."""
        return replace(self, val=self.val.spread(count), test=self.test.spread(count))

    @property
    def eval_splits(self) -> dict[str, Examples]:
        """Return the splits that are evaluated: `test` is reported, `val` (if there is one) selects the best epoch."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}

    @property
    def eval_paths(self) -> dict[str, list[str]]:
        """Return split -> paths of its examples, for the splits that are evaluated."""
        return {split: examples.paths for split, examples in self.eval_splits.items()}

    @property
    def val_split(self) -> str | None:
        """Return the split that the best epoch is selected on, or None if there is none besides the test split."""
        return "val" if self.val else None

    @property
    def paths(self) -> list[str]:
        """Return the paths of all examples, in the order train, val, test."""
        return [*self.train.paths, *self.val.paths, *self.test.paths]

    @property
    def num_evaluated(self) -> int:
        """Return the number of images that each epoch evaluates."""
        return len(self.val) + len(self.test)


def without_images(
    index: DatasetIndex, paths: Collection[str], *, absent: str = "can be read", remedy: str = "repair or replace them"
) -> DatasetIndex:
    """Return the index without some images.

    Args:
        index: the examples.
        paths: paths of the images.
        absent: what no image of a class or a split would be or do, for the error.
        remedy: what to do then.

    Raises:
        UserError: a class has no training image left, or an evaluation split has no image left.

    """
    train, val, test = (examples.without(paths) for examples in (index.train, index.val, index.test))
    labels = {*np.unique(train.labels).tolist()}
    empty = [name for label, name in enumerate(index.classes) if label not in labels]
    if empty:
        raise UserError(
            f"no training image of these classes {absent}: {join_truncated(empty)}. {remedy.capitalize()}, or remove "
            "the classes"
        )
    notes = list(index.notes)
    for before, after, purpose in ((index.val, val, PURPOSES["val"]), (index.test, test, PURPOSES["test"])):
        if before and not after:
            raise UserError(f"none of the {len(before)} images to {purpose} {absent}: {remedy}")
        old_notes = set(note_absent_classes(index.classes, before, purpose, "the images that are left"))
        new_notes = note_absent_classes(index.classes, after, purpose, "the images that are left")
        notes += [note for note in new_notes if note not in old_notes]
    return replace(index, train=train, val=val, test=test, notes=tuple(notes))


def write_split(index: DatasetIndex, path: Path) -> None:
    """Write the splits atomically as a CSV from which `read_index` returns the same splits.

    Raises:
        UserError: the file cannot be written.

    """
    splits = {"train": index.train, "val": index.val, "test": index.test}
    write_table(path, _rows(index, splits))


def write_excluded(index: DatasetIndex, path: Path) -> None:
    """Write the excluded images atomically as a CSV that the option `data.exclude` reads.

    Raises:
        UserError: the file cannot be written.

    """
    write_table(path, _rows(index, index.excluded), root=index.root)


def _rows(index: DatasetIndex, splits: Mapping[str, Examples]) -> Iterator[tuple[str, str, str]]:
    for split, examples in splits.items():
        yield from zip(examples.paths, map(index.classes.__getitem__, examples.labels.tolist()), repeat(split))


def note_absent_classes(classes: tuple[str, ...], examples: Examples, purpose: str, source: str) -> Iterator[str]:
    """Yield a note if some classes have no image in a split."""
    labels = {*np.unique(examples.labels).tolist()}
    absent = [name for label, name in enumerate(classes) if label not in labels]
    if absent:
        count = f"{len(absent)} of {len(classes)} classes"
        yield f"{count} have no image to {purpose} in {source}: {join_truncated(absent)}"
