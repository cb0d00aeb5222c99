"""From a folder or a CSV to the list of examples, in named parts, under the training classes.

    folder/train/CLASS/...   and val/CLASS/... (or valid/, validation/), test/CLASS/..., both or neither
    folder/CLASS/...         split here, by class and seed
    table.csv                path,label and, if given, split

`val` selects the best epoch and `test` is reported; where there is one of them, it is reported. A class has
the same number in every part: the place of its name among the training classes.
"""

import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.data.layout import Listing, read_folder
from trainer.data.split import Images, stratified_split
from trainer.data.table import read_table, write_table
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_PURPOSE = {"val": "select the best epoch on", "test": "report on"}


class Example(NamedTuple):
    """One image and its class."""

    path: str
    label: int
    """Place of its class in `DatasetIndex.classes`."""


@dataclass(frozen=True, kw_only=True)
class DatasetIndex:
    """The examples of a data set; in a part by class, then in the order of ImageFolder, or of the CSV."""

    root: Path
    """The folder; a CSV's own folder."""
    classes: tuple[str, ...]
    """The names of the training classes, sorted."""
    train: tuple[Example, ...]
    val: tuple[Example, ...]
    """What the best epoch is selected on; empty where nothing is held out for that."""
    test: tuple[Example, ...]
    """What is reported."""
    reported: str
    """Where the reported images come from, for a reader."""
    split_made: bool
    """Whether a seeded split was drawn here, and has to be written down."""
    notes: tuple[str, ...]
    """What was passed over, is missing or was cut; one line each."""

    @property
    def val_split(self) -> str | None:
        """Return the part that the best epoch is selected on, where it is not the one reported."""
        return "val" if self.val else None


def read_index(
    folder: Path, *, val_fraction: float, test_fraction: float, seed: int, extensions: Sequence[str]
) -> DatasetIndex:
    """Return the examples of a folder or a CSV.

    Args:
        folder: the data set; a file is read as a CSV.
        val_fraction: share of the training images cut out to select the best epoch on; 0: none.
        test_fraction: share held out to report on, where the data set brings no part for that.
        seed: of these splits.
        extensions: file name endings taken for images, with their dot, in any case; not applied to a CSV.

    Raises:
        UserError: a layout that is not understood, a class without training images, classes to evaluate that
            training lacks, or nothing to report on.

    """
    shown = f"data.root {escape_unprintable(str(folder))}"
    try:
        folder.stat()
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({error.strerror})") from None
    if folder.is_dir():
        root, listing = folder, read_folder(str(folder), tuple(extensions))
    elif folder.is_file():
        root, listing = folder.parent, _read_csv(folder)
    else:
        raise UserError(f"{shown}: neither a folder nor a CSV file")
    classes = tuple(sorted(listing.parts["train"]))
    _check(listing, classes, shown)
    listing, split_made = _with_splits(
        listing, shown, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed
    )
    parts = {
        part: tuple(
            Example(path, label) for label, name in enumerate(classes) for path in images.get(name, ())
        )
        for part, images in listing.parts.items()
    }
    notes = list(listing.notes)
    for part, purpose in _PURPOSE.items():
        if part in parts:
            if not parts[part]:
                raise UserError(
                    f"{shown}: no image to {purpose} in {listing.names[part]}. Expected at least one; a "
                    "class gives one to a split if it has two"
                )
            notes += _absent(classes, parts[part], purpose, listing.names[part])
    return DatasetIndex(
        root=root,
        classes=classes,
        train=parts["train"],
        val=parts.get("val", ()),
        test=parts["test"],
        reported=listing.names["test"],
        split_made=split_made,
        notes=tuple(notes),
    )


def without_images(index: DatasetIndex, unreadable: Mapping[str, str]) -> DatasetIndex:
    """Return the index without the images that cannot be read (path -> reason).

    Raises:
        UserError: a class is left without a training image, or a part without any.

    """

    def left(part: tuple[Example, ...]) -> tuple[Example, ...]:
        return tuple(example for example in part if example.path not in unreadable)

    train, val, test = left(index.train), left(index.val), left(index.test)
    labels = {example.label for example in train}
    gone = [name for label, name in enumerate(index.classes) if label not in labels]
    if gone:
        raise UserError(
            f"no training image of these classes can be read: {join_truncated(gone)}. Mend or replace their images, "
            "or remove the classes"
        )
    notes = list(index.notes)
    for before, after, purpose in ((index.val, val, _PURPOSE["val"]), (index.test, test, _PURPOSE["test"])):
        if before and not after:
            raise UserError(
                f"none of the {len(before)} images to {purpose} can be read: mend or replace them"
            )
        known = set(_absent(index.classes, before, purpose, "what could be read"))
        notes += [
            note for note in _absent(index.classes, after, purpose, "what could be read") if note not in known
        ]
    return replace(index, train=train, val=val, test=test, notes=tuple(notes))


def write_split(index: DatasetIndex, path: Path) -> None:
    """Write the parts as a CSV that `read_index` reads to the same ones; the file is whole or absent.

    Raises:
        UserError: it cannot be written.

    """
    parts = (("train", index.train), ("val", index.val), ("test", index.test))
    write_table(
        path,
        ((example.path, index.classes[example.label], name) for name, part in parts for example in part),
    )


def _read_csv(file: Path) -> Listing:
    rows, notes = read_table(file)
    parts: dict[str, Images] = {}
    for row in rows:
        parts.setdefault(row.part or "train", {}).setdefault(row.label, []).append(row.path)
    if "train" not in parts:
        raise UserError(
            f"data.root {escape_unprintable(str(file))}: no row's split is train, so there is nothing to train on"
        )
    names = {part: f"the CSV's {part} rows" for part in parts}
    return Listing(parts, names, [f"{len(rows)} images listed in {escape_unprintable(file.name)}", *notes])


def _check(listing: Listing, classes: tuple[str, ...], shown: str) -> None:
    """Raise a UserError for too few training classes, or others among the images to evaluate."""
    if len(classes) < 2:
        raise UserError(
            f"{shown}: a single class, {join_truncated(classes)}, in {listing.names['train']}; expected two or more, "
            "each with training images"
        )
    for part in ("val", "test"):
        extra = sorted(set(listing.parts.get(part, ())) - set(classes))
        if extra:
            normalize_name = {unicodedata.normalize("NFC", name) for name in classes}
            alike = any(unicodedata.normalize("NFC", name) in normalize_name for name in extra)
            raise UserError(
                f"{shown}: {listing.names[part]} has classes that training lacks: {join_truncated(extra)}. The "
                f"training classes: {join_truncated(classes, limit=20)}. Name them alike, add training images, or "
                "remove them"
                + (". Some differ only in how accents are encoded (Unicode NFC and NFD)" if alike else "")
            )


def _with_splits(
    listing: Listing, shown: str, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Listing, bool]:
    """Return the listing with parts drawn from its training images as asked for, and whether any was."""
    parts, names, notes = dict(listing.parts), dict(listing.names), list(listing.notes)
    if val_fraction and "val" in parts and "test" in parts:
        raise UserError(
            f"data.val_fraction is {val_fraction:g}, but {shown} has images to select the best epoch on "
            f"({names['val']}) and others to report on ({names['test']}): set data.val_fraction to 0, or "
            "take one of the two parts out"
        )
    if "val" in parts and "test" not in parts:
        parts["test"], names["test"] = parts.pop("val"), names.pop("val")
    wanted: list[tuple[Literal["val", "test"], float]] = []
    if "test" not in parts:
        if not test_fraction:
            raise UserError(
                f"{shown}: has no part to report on (val or test), and data.test_fraction is 0, so that none "
                "would be cut out of the training images. Set data.test_fraction to 0.2, say, or "
                "add such a part"
            )
        wanted.append(("test", test_fraction))
    if val_fraction:
        wanted.append(("val", val_fraction))
    for part, fraction in wanted:
        total = _count(parts["train"])
        parts["train"], parts[part] = stratified_split(parts["train"], fraction, seed=seed, purpose=part)
        names[part] = f"a split of {100 * fraction:g} %"
        notes.append(
            f"cut out of {listing.names['train']} to {_PURPOSE[part]}, by class and data.seed {seed}: "
            f"{_count(parts[part])} of {total} images ({100 * fraction:g} %)"
        )
    return Listing(parts, names, notes), bool(wanted)


def _count(images: Images) -> int:
    return sum(map(len, images.values()))


def _absent(classes: tuple[str, ...], part: Iterable[Example], purpose: str, where: str) -> Iterator[str]:
    """Yield a note if some classes have no image in a part."""
    labels = {example.label for example in part}
    absent = [name for label, name in enumerate(classes) if label not in labels]
    if absent:
        count = f"{len(absent)} of {len(classes)} classes"
        yield f"{count} have no image to {purpose} in {where}: {join_truncated(absent)}"
