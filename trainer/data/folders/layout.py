"""List the images of a dataset folder by split and class, and check that its folders are classes."""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH118

import os
from collections import Counter
from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from trainer.data.folders.check import Parent, check_class_folders, table_hint, unlabeled_error
from trainer.data.folders.scan import DirEntries, Scan, file_extension, top_folder
from trainer.data.split import PathsByClass
from trainer.errors import UserError
from trainer.text import escape_unprintable, has_invalid_utf8, join_truncated

# A folder whose files have only these extensions is not a class whose images were overlooked.
_TEXTS = (".txt", ".csv", ".tsv", ".json", ".jsonl", ".xml", ".yaml", ".yml", ".toml", ".md", ".rst", ".html", ".htm")
_DOCUMENTS = (".pdf", ".doc", ".docx", ".xls", ".xlsx", ".log", ".py", ".ipynb", ".sh", ".m")
_ARCHIVES = (".zip", ".gz", ".tar", ".rar", ".7z", ".mat", ".pkl", ".pt", ".pth", ".onnx", ".h5", ".safetensors")
_CODE = (".c", ".h", ".cpp", ".cu", ".js", ".ts", ".css", ".cfg", ".ini", ".pyc", ".so", ".lock", ".db", ".tex", ".bib")
_NOT_IMAGES = frozenset({*_TEXTS, *_DOCUMENTS, *_ARCHIVES, *_CODE})

_PLAIN_NAMES = frozenset({".", "train", "val", "test"})


class Listing(NamedTuple):
    """The images of a dataset, before train images are split further."""

    splits: dict[str, PathsByClass]
    """Split (train, and val and test if given) -> class -> paths."""
    sources: dict[str, str]
    """Split -> description of where its images are, for messages."""
    notes: list[str]
    groups: Mapping[str, str] = MappingProxyType({})
    """Path -> group, for images that have one: no split may divide a group."""


def read_folder(root: str, top: DirEntries, scan: Scan, folders: Mapping[str, str], *, check: bool) -> Listing:
    """Return the images of a dataset folder.

    Args:
        root: the folder.
        top: its entries.
        scan: scan of the dataset.
        folders: split -> folder of its class folders, relative to `root` or absolute; see `find_split_folders`.
        check: whether to check that the training folders are classes.

    Raises:
        UserError: folders that are not classes, an unreadable folder, or a training class folder without images.

    """
    if not top.folders:
        raise _no_folders_error(root, top, scan)
    sources = {
        split: "the folder" if folder == "." else f"{escape_unprintable(folder)}/" for split, folder in folders.items()
    }
    splits: dict[str, PathsByClass] = {}
    notes: list[str] = []
    for split, folder in sorted(folders.items(), key=lambda item: item[0] != "train"):
        path = root if folder == "." else os.path.join(root, folder)
        entries = top if folder == "." else scan.scan_parent(path)
        inside = {top_folder(os.path.relpath(os.path.join(root, other), path)) for other in folders.values()}
        entries = entries._replace(folders=[name for name in entries.folders if name not in inside])
        if not entries.folders:
            raise unlabeled_error(root, top.files, path, entries.files, sources["train"])
        splits[split] = _read_classes(path, sources[split], entries, scan, notes, training=split == "train")
        notes += _note_stray_files(sources[split], entries)
        if check and split == "train":
            notes += check_class_folders(Parent(path, entries.files, folder), splits["train"])
    if not {*folders.values()} <= _PLAIN_NAMES:
        listed = ", ".join(f"{split} is {source}" for split, source in sources.items())
        notes.append(f"splits of the folder: {listed}")
    if "." not in folders.values():
        others = sorted({*top.folders} - {top_folder(folder) for folder in folders.values()})
        if others:
            names = join_truncated(f"{name}/" for name in others)
            notes.append(f"folders beside {sources['train']} that are ignored: {names}")
        notes += _note_stray_files("the folder", top)
    return Listing(splits, sources, [*notes, *_note_ignored(root, scan)])


def _no_folders_error(root: str, top: DirEntries, scan: Scan) -> UserError:
    count = sum(map(scan.is_image, top.files))
    found = f"{count} images and no folders" if count else "no folders and no images"
    others = _format_counts(Counter(file_extension(name) for name in top.files if not scan.is_image(name)))
    return UserError(
        f"data.root {escape_unprintable(root)}: holds {found}{f' ({others})' if others else ''}. Expected train/ with "
        "one folder per class, and optionally val/ or test/ with the same class folders; or one folder per class; or a "
        f"CSV with the columns path, label and optionally split. {table_hint(root, top.files, '.')}"
    )


def _read_classes(
    folder: str, source: str, entries: DirEntries, scan: Scan, notes: list[str], *, training: bool
) -> PathsByClass:
    """Return class -> paths of its images; a folder without images is no class.

    Raises:
        UserError: a training class folder without images holds files that may be images of an unknown extension.

    """
    images: PathsByClass = {}
    without_images: list[str] = []
    unknown: list[str] = []
    for name in entries.folders:
        if has_invalid_utf8(name):
            raise UserError(
                f"{escape_unprintable(os.path.join(folder, name))}: the name of a class folder is not UTF-8, so the "
                "class could not be written into the model file. Rename the folder"
            )
        paths, others = scan.find_images(os.path.join(folder, name))
        if paths:
            images[name] = paths
        elif others.keys() <= _NOT_IMAGES or not training:
            without_images.append(f"{name}/")
        else:
            unknown.append(f"\n  {escape_unprintable(name)}/ holds {_format_counts(others)}")
    if unknown:
        shown = "".join(unknown[:10]) + (f"\n  and {len(unknown) - 10} more" if len(unknown) > 10 else "")
        raise UserError(
            f"{escape_unprintable(folder)}: {len(unknown)} of {len(entries.folders)} class folders hold no image:"
            f"{shown}\ndata.extensions is {' '.join(scan.extensions)}: add an extension there, fill the folders, "
            "remove them, or set data.root to the folder that holds the class folders"
        )
    if without_images:
        notes.append(f"folders in {source} without images, which are no classes: {join_truncated(without_images)}")
    return images


def _note_stray_files(source: str, entries: DirEntries) -> list[str]:
    count = len(entries.files)
    return [f"files of {source} outside the class folders that are ignored: {count}"] if count else []


def _note_ignored(root: str, scan: Scan) -> list[str]:
    notes = []
    if scan.ignored:
        extensions = " ".join(scan.extensions)
        notes.append(
            f"files ignored because of their extension: {_format_counts(scan.ignored)} "
            f"(data.extensions is {extensions})"
        )
    if scan.hidden:
        notes.append(f"hidden files and folders ignored: {scan.hidden}")
    if scan.outputs:
        outputs = (f"{os.path.relpath(folder, root)}/" for folder in scan.outputs)
        notes.append(f"output folders of regraft ignored: {join_truncated(outputs)}")
    if scan.repeated:
        notes.append(f"links to a folder that was already read, ignored: {scan.repeated}")
    return notes


def _format_counts(extensions: Counter[str]) -> str:
    """Return the counts for a message, the largest first."""
    largest_first = sorted(extensions.items(), key=lambda item: (-item[1], item[0]))
    return join_truncated((f"{count} {name}" for name, count in largest_first), limit=8)
