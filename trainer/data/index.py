"""The examples of a dataset, with train, val and test splits.

`val` selects the best epoch and `test` is reported. A single evaluation split is reported. The label of a class is
the same in every split: the position of its name among the sorted training classes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

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


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """The examples of a dataset, sorted by class, then in the order of ImageFolder or of the CSV."""

    root: Path
    """Dataset folder, or the folder of the CSV."""
    classes: tuple[str, ...]
    """Names of the training classes, sorted."""
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    """Examples to select the best epoch on; may be empty."""
    test: tuple[Example, ...]
    """Examples to report on."""
    reported: str
    """Description of where the test examples come from."""
    split_made: bool
    """Whether a seeded split was made, which the run must save."""
    notes: tuple[str, ...]
    """Messages about ignored files, missing classes and splits."""
    excluded: Mapping[str, tuple[Example, ...]] = field(default_factory=dict)
    """Split -> its examples that the option `data.exclude` leaves out."""
    groups: Mapping[str, str] = field(default_factory=dict)
    """Path -> what several images share, such as a patient, for images that have such a group."""

    def with_few_to_evaluate(self, count: int) -> "DatasetIndex":
        """Return the index with about `count` examples in each evaluated split, spread over the classes."""

        def spread(split: tuple[Example, ...]) -> tuple[Example, ...]:
            return split[:: max(1, len(split) // count)][:count]

        return replace(self, val=spread(self.val), test=spread(self.test))

    @property
    def eval_splits(self) -> dict[str, tuple[Example, ...]]:
        """Return the splits that are evaluated: `test` is reported, `val` (if there is one) selects the best epoch."""
        return {"val": self.val, "test": self.test} if self.val else {"test": self.test}

    @property
    def eval_paths(self) -> dict[str, list[str]]:
        """Return split -> paths of its examples, for the splits that are evaluated."""
        return {split: [example.path for example in examples] for split, examples in self.eval_splits.items()}

    @property
    def val_split(self) -> str | None:
        """Return the split that the best epoch is selected on, or None if there is none besides the test split."""
        return "val" if self.val else None

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

    def kept(examples: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(example for example in examples if example.path not in paths)

    train, val, test = kept(index.train), kept(index.val), kept(index.test)
    labels = {example.label for example in train}
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


def _rows(index: DatasetIndex, splits: Mapping[str, tuple[Example, ...]]) -> Iterator[tuple[str, str, str]]:
    for split, examples in splits.items():
        for path, label in examples:
            yield path, index.classes[label], split


def note_absent_classes(
    classes: tuple[str, ...], examples: Iterable[Example], purpose: str, source: str
) -> Iterator[str]:
    """Yield a note if some classes have no image in a split."""
    labels = {example.label for example in examples}
    absent = [name for label, name in enumerate(classes) if label not in labels]
    if absent:
        count = f"{len(absent)} of {len(classes)} classes"
        yield f"{count} have no image to {purpose} in {source}: {join_truncated(absent)}"
