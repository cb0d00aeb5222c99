"""Check that the folders of a dataset are its classes: not splits, domains, copies, or images without labels.

A model of two classes named train_images and test_images would be trained without an error. Folders are judged by the
folders below them that hold images, and by their names. In doubt, the error shows what was found and the options.
"""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH118, PTH208

import itertools
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.data.folders.contents import Folder, find_images_and_masks, find_leftovers, summarize
from trainer.data.split_names import are_dates_or_sessions, are_numbered_parts, share_names, split_kind, split_kinds
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated


class Parent(NamedTuple):
    """The folder that holds the class folders."""

    path: str
    files: Sequence[str]
    """Names of the files in it."""
    split_dir: str
    """The folder relative to data.root, `.` for data.root itself."""

    @property
    def is_root(self) -> bool:
        """Return whether this is data.root, rather than the folder of the training split."""
        return self.split_dir == "."

    @property
    def options(self) -> str:
        """Return how to say what the folders are."""
        folder = "data.root" if self.is_root else f"{self.split_dir}/"
        others = "" if self.is_root else ", and data.val_dir and data.test_dir to the other splits"
        return (
            "Name the folder of each split with data.train_dir, data.val_dir and data.test_dir (relative to "
            f"data.root). If the folders of {escape_unprintable(folder)} are the classes, set data.train_dir to "
            f"'{escape_unprintable(self.split_dir)}'{others}."
        )


def check_class_folders(parent: Parent, images: Mapping[str, Sequence[str]]) -> list[str]:
    """Return notes about the folders with images (class -> paths); raise a UserError unless they can be the classes."""
    folders = [summarize(os.path.join(parent.path, name), name, paths) for name, paths in images.items()]
    if parent.is_root:
        _check_split_names(parent, folders)
    if problem := find_images_and_masks(folders):
        raise _error(parent, folders, problem, f"{table_hint(parent.path, parent.files, '.')} {parent.options}")
    if len(folders) < 2:
        _check_single(parent, folders)
        return []
    if all(len({*map(split_kind, folder.inner)} - {None}) > 1 for folder in folders):
        problem = "each of these folders holds folders of splits, but splits must hold the classes (train/CLASS/)"
        use = f"To use one of them alone: --data.root {_join(parent.path, folders[0].name)}."
        raise _error(parent, folders, problem, f"Move them, or list the images in a CSV with a column split. {use}")
    for folder in folders:
        kinds = {split_kind(name) for name in folder.inner} - {None}
        use = f"use --data.root {_join(parent.path, folder.name)}. {parent.options}"
        if len(kinds) > 1 or "train" in map(split_kind, folder.wrappers):
            inner = join_truncated(folder.inner if len(kinds) > 1 else folder.wrappers, limit=4)
            problem = f"{folder.name}/ holds folders of splits ({inner})"
            raise _error(parent, folders, problem, f"If {escape_unprintable(folder.name)}/ is the dataset, {use}")
        if share_names(folder.inner, [other for other in images if other != folder.name]):
            problem = f"{folder.name}/ holds folders of the same names as the folders beside it"
            raise _error(parent, folders, problem, f"It may be a copy of the dataset: move it away, or {use}")
    for leftover in find_leftovers(folders, images):
        raise _error(parent, folders, leftover.problem, f"{leftover.remedy} {parent.options}")
    parts = [folder for folder in folders if folder.is_nested and not are_dates_or_sessions(folder.inner)]
    for one, other in itertools.combinations(parts, 2):
        if share_names(one.inner, other.inner):
            problem = (
                f"{one.name}/ and {other.name}/ hold folders of the same names, so they look like parts of a dataset "
                "(splits, folds, domains or copies) rather than classes"
            )
            use = f"To use one of them alone: --data.root {_join(parent.path, one.name)}"
            raise _error(parent, folders, problem, f"{parent.options} {use}")
    nested = [f"{folder.name}/ ({join_truncated(folder.inner, limit=3)})" for folder in folders if folder.inner]
    return [f"class folders with subfolders, whose images are of the same class: {join_truncated(nested, limit=3)}"] * (
        len(nested) > 0
    )


def _check_split_names(root: Parent, folders: Sequence[Folder]) -> None:
    """Raise a UserError if the folders have the names of splits or of numbered parts."""
    names = [folder.name for folder in folders]
    kinds = split_kinds(names)
    nested = [folder for folder in folders if folder.is_nested]
    words = {folder.name: word for folder in nested if (word := _split_word(folder.name))}
    for name, word in words.items():
        # One of many class folders with subfolders may be a train_station/.
        if len(folders) > 1 and (name in kinds or 2 * len(words) >= len(nested)):
            problem = f"{name}/ looks like a split of a dataset ({word}) rather than a class"
            raise _error(root, folders, problem, root.options)
    if names and (len(set(kinds.values())) > 1 or len(kinds) == len(names)):
        train = next((name for name, kind in kinds.items() if kind == "train"), ".")
        listed = join_truncated(f"{name}/" for name in sorted(kinds))
        problem = (
            f"{listed} look like splits of a dataset rather than classes, but there is no train/ with class folders"
        )
        raise _error(root, folders, problem, f"{table_hint(root.path, root.files, train)} {root.options}")
    for name in kinds:
        may_be_class = name.lower() == "train" or (
            name.lower() == "valid" and any("valid" in other.lower() for other in names if other != name)
        )
        if not may_be_class:
            problem = f"{name}/ looks like a split of a dataset without class folders, rather than a class"
            raise _error(root, folders, problem, f"If its images have no labels, move it away. {root.options}")
    if are_numbered_parts(names) and not any(folder.inner for folder in folders):
        problem = "the folders look like parts of a dataset rather than classes"
        raise _error(root, folders, problem, f"{table_hint(root.path, root.files, '.')} {root.options}")


def _split_word(name: str) -> str | None:
    """Return the word of a split in a name such as `my_train`."""
    return next((word for word in re.split(r"[\W_]+", name) if split_kind(word)), None)


def _check_single(parent: Parent, folders: Sequence[Folder]) -> None:
    """Raise a UserError if the only folder with images may be the dataset, or has its labels in a CSV."""
    for folder in folders:
        wrappers = itertools.takewhile(lambda name: not split_kind(name), folder.wrappers)
        inner = escape_unprintable(os.path.join(parent.path, folder.name, *wrappers))
        if folder.inner and parent.is_root:
            hint = f"If it is the dataset, use --data.root {inner}"
        elif folder.inner:
            hint = f"If its folders are the classes, set data.train_dir to {inner}, and the other splits likewise"
        else:
            hint = table_hint(parent.path, parent.files, folder.name) if _tables(parent.files) else ""
        if hint:
            raise UserError(
                f"{_where(parent)}: holds a single folder with images, {escape_unprintable(folder.name)}/, so there "
                f"would be one class. {hint}"
            )


def unlabeled_error(root: str, root_files: Sequence[str], path: str, files: Sequence[str], train: str) -> UserError:
    """Return the error to raise if a split has no class folders.

    Args:
        root: folder of the dataset.
        root_files: names of its files.
        path: folder of the split.
        files: names of its files.
        train: description of the training folder.

    """
    folder, tables = (path, files) if _tables(files) else (root, root_files)
    return UserError(
        f"{escape_unprintable(path)}: it has no class folders, so its {len(files)} files have no label. Sort them into "
        f"folders named as those of {train}, or move it away, or set data.train_dir, data.val_dir and data.test_dir to "
        f"the folders to use. {table_hint(folder, tables, os.path.relpath(path, folder))}"
    )


def table_hint(folder: str, files: Sequence[str], images: str) -> str:
    """Return how to use a CSV in the folder for the labels of the images in `images`."""
    tables = _tables(files)
    if not tables and images != "." and (inside := _tables(sorted(os.listdir(os.path.join(folder, images))))):
        folder, images, tables = os.path.join(folder, images), ".", inside
    tables = tables or ["TABLE.csv"]
    name = Path(images).name.lower()
    table = _join(folder, next((table for table in tables if name in table.lower()), tables[0]))
    images = escape_unprintable(os.path.normpath(os.path.join(folder, images)))
    return (
        f"If the labels are in a CSV, use --data.root {table} --data.csv_root {images}, with data.csv_suffix if its "
        "names have no extension."
    )


def _tables(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.lower().endswith((".csv", ".tsv"))]


def _error(parent: Parent, folders: Sequence[Folder], problem: str, hint: str) -> UserError:
    shown = "".join(_describe(folder) for folder in folders[:10])
    more = f"\n  and {len(folders) - 10} more" if len(folders) > 10 else ""
    return UserError(f"{_where(parent)}: {escape_unprintable(problem)}:{shown}{more}\n{hint}")


def _describe(folder: Folder) -> str:
    names = f" in {len(folder.inner)} folders ({join_truncated(folder.inner, limit=4)})" if folder.inner else ""
    return f"\n  {escape_unprintable(folder.name)}/: {folder.images} images{names or ', no class folders'}"


def _where(parent: Parent) -> str:
    return f"{'data.root ' if parent.is_root else ''}{escape_unprintable(parent.path)}"


def _join(root: str, name: str) -> str:
    return escape_unprintable(os.path.join(root, name))
