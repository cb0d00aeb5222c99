"""Detect the layout of a dataset folder and list its images: split folders with class folders, or class folders."""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH118

import os
from collections import Counter
from typing import NamedTuple

from trainer.data.scan import DirEntries, Scan, file_extension, scan_dir
from trainer.data.split import PathsByClass
from trainer.data.table import SPLIT_NAMES
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

# Names that are likely splits and unlikely classes; only those of SPLIT_NAMES are supported.
_LIKELY_SPLITS = frozenset({*SPLIT_NAMES, "training", "testing", "eval", "evaluation", "dev"})
_MAX_HINT_DEPTH = 5
_EXPECTED = (
    "Expected train/ with one folder per class, and optionally val/ or test/ with the same class folders; or one "
    "folder per class; or a CSV with the header path,label,split"
)


class Listing(NamedTuple):
    """The images of a dataset, before train images are split further."""

    splits: dict[str, PathsByClass]
    """Split (train, and val and test if given) -> class -> paths."""
    sources: dict[str, str]
    """Split -> description of where its images are, for messages."""
    notes: list[str]


def read_folder(root: str, extensions: tuple[str, ...]) -> Listing:
    """Return the images of a dataset folder.

    Raises:
        UserError: an unknown layout, an unreadable folder, or a training class folder without images.

    """
    scan = Scan(tuple(extension.lower() for extension in extensions))
    top = scan.scan_parent(root)
    notes: list[str] = []
    split_folders = _find_split_folders(root, top, scan)
    if split_folders:
        sources = {split: f"{folder}/" for split, folder in split_folders.items()}
        splits = {}
        train_first = sorted(split_folders.items(), key=lambda item: item[0] != "train")
        for split, folder in train_first:
            path = os.path.join(root, folder)
            entries = scan.scan_parent(path)
            if not entries.folders:
                raise UserError(
                    f"{escape_unprintable(path)}: it has no class folders, so its {len(entries.files)} files have no "
                    f"label. Sort them into folders named as those of {sources['train']}, or move it away"
                )
            splits[split] = _read_classes(path, entries, scan, training=split == "train")
            notes += _note_stray_files(sources[split], entries)
        others = [f"{name}/" for name in top.folders if name not in split_folders.values()]
        notes += [f"folders beside {sources['train']} that are ignored: {join_truncated(others)}"] if others else []
    else:
        _check_class_folders(root, top, scan)
        sources = {"train": "the folder"}
        splits = {"train": _read_classes(root, top, scan, training=True)}
    return Listing(splits, sources, [*notes, *_note_stray_files("the folder", top), *_note_ignored(scan)])


def _find_split_folders(root: str, top: DirEntries, scan: Scan) -> dict[str, str]:
    """Return split -> the name of its folder; empty if `root` has no split folders.

    A folder named train is a split if it holds class folders, and a class (of vehicles, say) if it holds images.
    If it holds both, it is a split if another split has class folders of the same names, or if all folders of
    `root` have names of splits.
    """
    folders: dict[str, list[str]] = {}
    for name in top.folders:
        if name.lower() in SPLIT_NAMES:
            folders.setdefault(SPLIT_NAMES[name.lower()], []).append(name)
    entries = {split: [scan_dir(os.path.join(root, name)) for name in names] for split, names in folders.items()}
    eval_classes = {name for split in ("val", "test") for inner in entries.get(split, []) for name in inner.folders}
    only_splits = all(name.lower() in SPLIT_NAMES for name in top.folders)
    if not any(
        inner.folders and (only_splits or not _count_images(inner, scan) or not eval_classes.isdisjoint(inner.folders))
        for inner in entries.get("train", [])
    ):
        return {}
    for split, names in folders.items():
        if len(names) > 1:
            raise UserError(
                f"data.root {escape_unprintable(root)}: {' and '.join(f'{name}/' for name in names)} are the "
                f"same split, {split}. Keep one of them, or merge them"
            )
    return {split: names[0] for split, names in folders.items()}


def _read_classes(folder: str, entries: DirEntries, scan: Scan, *, training: bool) -> PathsByClass:
    """Return class -> paths of its images."""
    images: PathsByClass = {}
    empty: list[str] = []
    for name in entries.folders:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise UserError(
                f"{escape_unprintable(os.path.join(folder, name))}: the name of a class folder is not UTF-8, so the "
                "class could not be written into the model file. Rename the folder"
            )
        images[name], others = scan.find_images(os.path.join(folder, name))
        if not images[name]:
            empty.append(f"\n  {escape_unprintable(name)}/ holds {_format_counts(others) or 'no files'}")
    if training and empty:
        shown = "".join(empty[:10]) + (f"\n  and {len(empty) - 10} more" if len(empty) > 10 else "")
        raise UserError(
            f"{escape_unprintable(folder)}: {len(empty)} of {len(entries.folders)} class folders hold no image:"
            f"{shown}\ndata.extensions is {' '.join(scan.extensions)}: add an extension there, fill the folders, or "
            "remove them"
        )
    return images


def _check_class_folders(root: str, top: DirEntries, scan: Scan) -> None:
    """Raise a UserError unless the folders of `root` can be its classes."""
    where = f"data.root {escape_unprintable(root)}"
    if not top.folders:
        count = _count_images(top, scan)
        found = f"{count} images and no folders" if count else "no folders and no images"
        others = _format_counts(Counter(file_extension(name) for name in top.files if not scan.is_image(name)))
        raise UserError(f"{where}: holds {found}" + (f" ({others})" if others else "") + f". {_EXPECTED}")
    likely_splits = [name for name in top.folders if name.lower() in _LIKELY_SPLITS]
    if (
        len(likely_splits) == len(top.folders)
        or sum(_has_only_folders(os.path.join(root, name), scan) for name in likely_splits) > 1
    ):
        raise UserError(
            f"{where}: {join_truncated(f'{name}/' for name in likely_splits)} look like splits of a dataset "
            f"rather than classes, but there is no train/ with class folders. {_EXPECTED}"
        )
    if len(top.folders) == 1:
        inner = _find_inner_dataset(os.path.join(root, top.folders[0]), scan)
        if inner is not None:
            raise UserError(
                f"{where}: holds a single folder, {escape_unprintable(top.folders[0])}/, so there would be one class. "
                f"If that folder is the dataset, use --data.root {escape_unprintable(inner)}"
            )


def _find_inner_dataset(folder: str, scan: Scan) -> str | None:
    """Return the first folder, from `folder` downwards, that holds more than a single folder."""
    for _ in range(_MAX_HINT_DEPTH):
        entries = scan_dir(folder)
        if len(entries.folders) > 1 or any(name.lower() in SPLIT_NAMES for name in entries.folders):
            return folder
        if not entries.folders or _count_images(entries, scan):
            return None
        folder = os.path.join(folder, entries.folders[0])
    return None


def _count_images(entries: DirEntries, scan: Scan) -> int:
    return sum(map(scan.is_image, entries.files))


def _has_only_folders(folder: str, scan: Scan) -> bool:
    entries = scan_dir(folder)
    return bool(entries.folders) and not _count_images(entries, scan)


def _note_stray_files(source: str, entries: DirEntries) -> list[str]:
    count = len(entries.files)
    return [f"files of {source} outside the class folders that are ignored: {count}"] if count else []


def _note_ignored(scan: Scan) -> list[str]:
    notes = []
    if scan.ignored:
        extensions = " ".join(scan.extensions)
        notes.append(
            f"files ignored because of their extension: {_format_counts(scan.ignored)} "
            f"(data.extensions is {extensions})"
        )
    if scan.hidden:
        notes.append(f"hidden files and folders ignored: {scan.hidden}")
    if scan.repeated:
        notes.append(f"links to a folder that was already read, ignored: {scan.repeated}")
    return notes


def _format_counts(extensions: Counter[str]) -> str:
    """Return the counts for a message, the largest first."""
    largest_first = sorted(extensions.items(), key=lambda item: (-item[1], item[0]))
    return join_truncated((f"{count} {name}" for name, count in largest_first), limit=8)
