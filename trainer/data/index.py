"""List the examples of a dataset folder or CSV file, with train, val and test splits.

    folder/train/CLASS/...   with val/CLASS/..., test/CLASS/..., both or neither; also training_set/, dev/, ...
    folder/CLASS/...         split here, by class and seed
    list.csv                 columns path, label and optionally split; any other names and delimiters

`val` selects the best epoch and `test` is reported. A single evaluation split is reported. The label of a class is
the same in every split: the position of its name among the sorted training classes.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal, NamedTuple

from trainer.data.class_names import describe_difference, find_lookalikes
from trainer.data.csv_write import write_table
from trainer.data.folder_cache import FolderCache
from trainer.data.group_by import describe_divided, find_groups
from trainer.data.layout import Listing, read_folder
from trainer.data.scan import Scan, scan_dir
from trainer.data.split import PathsByClass, grouped_split
from trainer.data.split_folders import find_split_folders
from trainer.data.table import TableFormat, read_table
from trainer.errors import UserError
from trainer.run.garbage_collector import without_gc
from trainer.text import escape_unprintable, join_truncated

_PURPOSE = {"val": "select the best epoch on", "test": "report on"}


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


@without_gc()
def read_index(
    folder: Path,
    *,
    val_fraction: float,
    test_fraction: float,
    seed: int,
    extensions: Sequence[str],
    split_dirs: Mapping[str, str | None] | None = None,
    table: TableFormat | None = None,
    group_by: str | None = None,
    cache: Path | None = None,
) -> DatasetIndex:
    """Return the examples of a folder or a CSV file.

    Args:
        folder: dataset folder, or a CSV file.
        val_fraction: fraction of the training images held out to select the best epoch on; 0 for none.
        test_fraction: fraction held out to report on, if the dataset has no split for it.
        seed: seed of these splits.
        extensions: file extensions of images, with their dot, in any case; not used for a CSV.
        split_dirs: split -> its folder, or None to look for it; not allowed for a CSV.
        table: how to read a CSV; not allowed for a folder.
        group_by: regular expression that captures the group in a path, as the option `data.group_by`; replaces the
            groups of a CSV.
        cache: cache folder, in which the entries of class folders are kept; None: every folder is scanned.

    Raises:
        UserError: an unknown layout, a class without training images, class names that look the same, evaluation
            classes that are not in the training split, or no images to report on.

    """
    where = f"data.root {escape_unprintable(str(folder))}"
    try:
        folder.stat()
    except OSError as error:
        raise UserError(f"{where}: cannot be read ({error.strerror})") from None
    table = table or TableFormat()
    given = {split: path for split, path in (split_dirs or {}).items() if path is not None}
    if folder.is_dir():
        if table != TableFormat():
            raise UserError(f"{where}: a folder, but data.csv_columns, csv_root and csv_suffix are for a CSV")
        root, listing = folder, _read_folder(str(folder), extensions, given, cache)
    elif folder.is_file():
        if given:
            options = " and ".join(f"data.{split}_dir" for split in given)
            raise UserError(f"{where}: a file, but {options} need a folder: a column of the CSV says the split")
        root, listing = table.folder(folder), _read_csv(folder, table)
    else:
        raise UserError(f"{where}: neither a folder nor a CSV file")
    classes = tuple(sorted(listing.splits["train"]))
    _check_classes(listing, classes, where)
    listing = _add_groups(listing, group_by, str(root))
    if spaced := [repr(name) for name in classes if name != name.strip()]:
        listing.notes.append(f"class names that begin or end with spaces: {join_truncated(spaced)}")
    listing, split_made = _add_splits(listing, where, val_fraction=val_fraction, test_fraction=test_fraction, seed=seed)
    splits = {
        split: tuple(Example(path, label) for label, name in enumerate(classes) for path in images.get(name, ()))
        for split, images in listing.splits.items()
    }
    notes = list(listing.notes)
    for split, purpose in _PURPOSE.items():
        if split in splits:
            if not splits[split]:
                raise UserError(
                    f"{where}: no image to {purpose} in {listing.sources[split]}. Expected at least one; a "
                    "class needs two images, or two groups, to give one to a split"
                )
            notes += _note_absent_classes(classes, splits[split], purpose, listing.sources[split])
    return DatasetIndex(
        root=root,
        classes=classes,
        train=splits["train"],
        val=splits.get("val", ()),
        test=splits["test"],
        reported=listing.sources["test"],
        split_made=split_made,
        notes=tuple(notes),
        groups=listing.groups,
    )


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
    for before, after, purpose in ((index.val, val, _PURPOSE["val"]), (index.test, test, _PURPOSE["test"])):
        if before and not after:
            raise UserError(f"none of the {len(before)} images to {purpose} {absent}: {remedy}")
        old_notes = set(_note_absent_classes(index.classes, before, purpose, "the images that are left"))
        new_notes = _note_absent_classes(index.classes, after, purpose, "the images that are left")
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


def _read_folder(root: str, extensions: Sequence[str], given: Mapping[str, str], cache: Path | None) -> Listing:
    folder_cache = FolderCache.read(cache, root) if cache is not None else None
    scan = Scan(
        tuple(extension.lower() for extension in extensions),
        scan_dir if folder_cache is None else folder_cache.scan_dir,
    )
    top = scan.scan_parent(root)
    folders = find_split_folders(root, top, scan.is_image, given)
    listing = read_folder(root, top, scan, folders, check="train" not in given)
    if folder_cache is not None:
        folder_cache.write()
    return listing


def _read_csv(file: Path, table: TableFormat) -> Listing:
    rows, notes = read_table(file, table)
    splits: dict[str, PathsByClass] = {}
    for row in rows:
        splits.setdefault(row.split or "train", {}).setdefault(row.label, []).append(row.path)
    if "train" not in splits:
        raise UserError(
            f"data.root {escape_unprintable(str(file))}: no row has the split train, so there are no training images"
        )
    sources = {split: f"the CSV's {split} rows" for split in splits}
    groups = {row.path: row.group for row in rows if row.group}
    notes = [f"{len(rows)} images listed in {escape_unprintable(file.name)}", *notes]
    return Listing(splits, sources, notes, groups)


def _add_groups(listing: Listing, group_by: str | None, root: str) -> Listing:
    """Return the listing with the groups of `group_by`, if it is set, and with notes about groups."""
    splits = {split: [path for paths in images.values() for path in paths] for split, images in listing.splits.items()}
    groups, notes = listing.groups, list[str]()
    if group_by is not None:
        groups, note = find_groups(group_by, [path for paths in splits.values() for path in paths], root)
        notes.append(note)
    elif groups:
        notes.append(f"groups of the CSV: {len({*groups.values()})} of {len(groups)} images")
    if groups:
        notes += describe_divided(splits, groups)
    return listing._replace(groups=groups, notes=[*listing.notes, *notes])


def _check_classes(listing: Listing, classes: tuple[str, ...], where: str) -> None:
    """Raise a UserError for too few training classes, names that look the same, or other classes in evaluation."""
    lookalikes = find_lookalikes({name for images in listing.splits.values() for name in images})
    if lookalikes:
        raise UserError(
            f"{where}: the classes {describe_difference(*lookalikes)}: they would be two classes of one name. "
            "Rename or merge them"
        )
    if len(classes) < 2:
        found = f"a single class, {join_truncated(classes)}," if classes else "no class with images"
        raise UserError(
            f"{where}: {found} in {listing.sources['train']}; expected at least two, each with training images"
        )
    for split in ("val", "test"):
        extra = sorted(set(listing.splits.get(split, ())) - set(classes))
        if extra:
            raise UserError(
                f"{where}: {listing.sources[split]} has classes that are not training classes: "
                f"{join_truncated(extra)}. The training classes are {join_truncated(classes, limit=20)}. "
                "Use the same names, add training images, or remove the classes"
            )


def _add_splits(
    listing: Listing, where: str, *, val_fraction: float, test_fraction: float, seed: int
) -> tuple[Listing, bool]:
    """Return the listing with the requested splits of its training images, and whether any was made."""
    splits, sources, notes = dict(listing.splits), dict(listing.sources), list(listing.notes)
    if val_fraction and "val" in splits and "test" in splits:
        raise UserError(
            f"data.val_fraction is {val_fraction:g}, but {where} has images to select the best epoch on "
            f"({sources['val']}) and others to report on ({sources['test']}): set data.val_fraction to 0, or "
            "remove one of the two splits"
        )
    if "val" in splits and "test" not in splits:
        splits["test"], sources["test"] = splits.pop("val"), sources.pop("val")
    requested: list[tuple[Literal["val", "test"], float]] = []
    if "test" not in splits:
        if not test_fraction:
            raise UserError(
                f"{where}: has no split to report on (val or test), and data.test_fraction is 0, so none "
                "would be held out from the training images. Set data.test_fraction, for example to 0.2, or "
                "add such a split"
            )
        requested.append(("test", test_fraction))
    if val_fraction:
        requested.append(("val", val_fraction))
    for split, fraction in requested:
        total = _count(splits["train"])
        splits["train"], splits[split] = grouped_split(
            splits["train"], listing.groups, fraction, seed=seed, purpose=split
        )
        sources[split] = f"a split of {100 * fraction:g} %"
        notes.append(
            f"held out from {listing.sources['train']} to {_PURPOSE[split]}, by class and data.seed {seed}: "
            f"{_count(splits[split])} of {total} images ({100 * fraction:g} %)"
        )
    return Listing(splits, sources, notes, listing.groups), bool(requested)


def _count(images: PathsByClass) -> int:
    return sum(map(len, images.values()))


def _note_absent_classes(
    classes: tuple[str, ...], examples: Iterable[Example], purpose: str, source: str
) -> Iterator[str]:
    """Yield a note if some classes have no image in a split."""
    labels = {example.label for example in examples}
    absent = [name for label, name in enumerate(classes) if label not in labels]
    if absent:
        count = f"{len(absent)} of {len(classes)} classes"
        yield f"{count} have no image to {purpose} in {source}: {join_truncated(absent)}"
