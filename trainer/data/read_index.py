"""List the examples of a dataset folder or CSV file.

folder/train/CLASS/...   with val/CLASS/..., test/CLASS/..., both or neither; also training_set/, dev/, ...
folder/CLASS/...         split here, by class and seed
list.csv                 columns path, label and optionally split; any other names and delimiters
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

from trainer.data.class_names import describe_difference, find_lookalikes
from trainer.data.csv.table import TableFormat, read_table
from trainer.data.folders.cache import FolderCache
from trainer.data.folders.layout import Listing, read_folder
from trainer.data.folders.scan import Scan
from trainer.data.folders.splits import find_split_folders
from trainer.data.group_by import describe_divided, find_groups
from trainer.data.index import PURPOSES, DatasetIndex, Examples, note_absent_classes
from trainer.data.split import PathsByClass, grouped_split
from trainer.errors import UserError
from trainer.run.garbage_collector import without_gc
from trainer.text import escape_unprintable, join_truncated


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
        split: Examples.of_classes(images.get(name, ()) for name in classes) for split, images in listing.splits.items()
    }
    notes = list(listing.notes)
    for split, purpose in PURPOSES.items():
        if split in splits:
            if not splits[split]:
                raise UserError(
                    f"{where}: no image to {purpose} in {listing.sources[split]}. Expected at least one; a "
                    "class needs two images, or two groups, to give one to a split"
                )
            notes += note_absent_classes(classes, splits[split], purpose, listing.sources[split])
    return DatasetIndex(
        root=root,
        classes=classes,
        train=splits["train"],
        val=splits.get("val", Examples()),
        test=splits["test"],
        reported=listing.sources["test"],
        split_made=split_made,
        notes=tuple(notes),
        groups=listing.groups,
    )


def _read_folder(root: str, extensions: Sequence[str], given: Mapping[str, str], cache: Path | None) -> Listing:
    folder_cache = FolderCache.read(cache, root) if cache is not None else None
    scan = Scan(tuple(extension.lower() for extension in extensions))
    if folder_cache is not None:
        scan = replace(scan, scan_dir=folder_cache.scan_dir, has_files=folder_cache.has_files)
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
            f"held out from {listing.sources['train']} to {PURPOSES[split]}, by class and data.seed {seed}: "
            f"{_count(splits[split])} of {total} images ({100 * fraction:g} %)"
        )
    return Listing(splits, sources, notes, listing.groups), bool(requested)


def _count(images: PathsByClass) -> int:
    return sum(map(len, images.values()))
