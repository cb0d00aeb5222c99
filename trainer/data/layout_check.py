"""Check that the folders of a dataset are its classes: not splits, domains, copies, or images without labels.

A model of two classes named train_images and test_images would be trained without an error. Folders are judged by the
folders below them that hold images, and by their names. In doubt, the error shows what was found and the options.
"""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH118, PTH206

import itertools
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from trainer.data.split_names import are_numbered_parts, share_names, split_kind, split_kinds
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

_OPTIONS = (
    "Name the folder of each split with data.train_dir, data.val_dir and data.test_dir (relative to data.root). If the "
    "folders of data.root are the classes, set data.train_dir to '.'."
)
_MASKS = frozenset({"mask", "masks", "label", "labels", "annotation", "annotations", "groundtruth", "gt"})
_IMAGES = frozenset({"image", "images", "img", "imgs"})


class _Folder(NamedTuple):
    """A folder that would be a class."""

    name: str
    images: int
    wrappers: tuple[str, ...]
    """Names of the folders that hold all of its images, one inside the other; often none."""
    inner: tuple[str, ...]
    """Names of the folders with images below these."""
    is_flat: bool
    """Whether there are images beside the inner folders."""

    def describe(self) -> str:
        names = f" in {len(self.inner)} folders ({join_truncated(self.inner, limit=4)})" if self.inner else ""
        return f"\n  {escape_unprintable(self.name)}/: {self.images} images{names or ', no class folders'}"


def check_class_folders(
    parent: str, files: Sequence[str], images: Mapping[str, Sequence[str]], *, is_root: bool
) -> None:
    """Raise a UserError unless the folders with images can be the classes.

    Args:
        parent: the folder that holds them.
        files: names of the files beside them.
        images: class -> paths of its images.
        is_root: whether `parent` is data.root, rather than the folder of the training split.

    """
    folders = [_summarize(os.path.join(parent, name), name, paths) for name, paths in images.items()]
    if is_root:
        _check_split_names(parent, files, folders)
    _check_images_and_masks(parent, files, folders)
    if len(folders) < 2:
        _check_single(parent, files, folders, is_root=is_root)
        return
    if all(len({*map(split_kind, folder.inner)} - {None}) > 1 for folder in folders):
        problem = "each class holds its splits, but the splits must hold the classes (train/CLASS/, test/CLASS/)"
        raise _error(parent, folders, problem, "Move the folders, or list the images in a CSV with a column split.")
    for folder in folders:
        kinds = {split_kind(name) for name in folder.inner} - {None}
        use = f"use --data.root {_join(parent, folder.name)}. {_OPTIONS}"
        if len(kinds) > 1 or "train" in map(split_kind, folder.wrappers):
            inner = join_truncated(folder.inner if len(kinds) > 1 else folder.wrappers, limit=4)
            problem = f"{folder.name}/ holds folders of splits ({inner})"
            raise _error(parent, folders, problem, f"If {escape_unprintable(folder.name)}/ is the dataset, {use}")
        if share_names(folder.inner, [other for other in images if other != folder.name]):
            problem = f"{folder.name}/ holds folders of the same names as the folders beside it"
            raise _error(parent, folders, problem, f"It may be a copy of the dataset: move it away, or {use}")
    parts = [folder for folder in folders if len(folder.inner) > 1 and not folder.is_flat]
    for one, other in itertools.combinations(parts, 2):
        if share_names(one.inner, other.inner):
            problem = (
                f"{one.name}/ and {other.name}/ hold folders of the same names, so they look like parts of a dataset "
                "(splits, folds, domains or copies) rather than classes"
            )
            use = f"To use one of them alone: --data.root {_join(parent, one.name)}"
            raise _error(parent, folders, problem, f"{_OPTIONS} {use}")


def _check_split_names(root: str, files: Sequence[str], folders: Sequence[_Folder]) -> None:
    """Raise a UserError if the folders have the names of splits or of numbered parts."""
    names = [folder.name for folder in folders]
    kinds = split_kinds(names)
    for folder in folders:
        words = [word for word in re.split(r"[\W_]+", folder.name) if split_kind(word)]
        if words and len(folder.inner) > 1 and not folder.is_flat and len(folders) > 1:
            problem = f"{folder.name}/ looks like a split of a dataset ({words[0]}) rather than a class"
            raise _error(root, folders, problem, _OPTIONS)
    if names and (len(set(kinds.values())) > 1 or len(kinds) == len(names)):
        train = next((name for name, kind in kinds.items() if kind == "train"), ".")
        listed = join_truncated(f"{name}/" for name in sorted(kinds))
        problem = (
            f"{listed} look like splits of a dataset rather than classes, but there is no train/ with class folders"
        )
        raise _error(root, folders, problem, f"{table_hint(root, files, train)} {_OPTIONS}")
    if are_numbered_parts(names) and not any(folder.inner for folder in folders):
        problem = "the folders look like parts of a dataset rather than classes"
        raise _error(root, folders, problem, f"{table_hint(root, files, '.')} {_OPTIONS}")


def _check_images_and_masks(parent: str, files: Sequence[str], folders: Sequence[_Folder]) -> None:
    """Raise a UserError if the folders are those of a segmentation or detection dataset."""
    names = {re.sub(r"[\W_]", "", folder.name.lower()) for folder in folders}
    if names & _IMAGES and names & _MASKS:
        problem = "the folders look like images and their masks or labels rather than classes"
        raise _error(parent, folders, problem, f"{table_hint(parent, files, '.')} {_OPTIONS}")


def _check_single(parent: str, files: Sequence[str], folders: Sequence[_Folder], *, is_root: bool) -> None:
    """Raise a UserError if the only folder with images may be the dataset, or has its labels in a CSV."""
    for folder in folders:
        wrappers = itertools.takewhile(lambda name: not split_kind(name), folder.wrappers)
        inner = escape_unprintable(os.path.join(parent, folder.name, *wrappers))
        if folder.inner and is_root:
            hint = f"If it is the dataset, use --data.root {inner}"
        elif folder.inner:
            hint = f"If its folders are the classes, set data.train_dir to {inner}, and the other splits likewise"
        else:
            hint = table_hint(parent, files, folder.name) if _tables(files) else ""
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


def _summarize(path: str, name: str, paths: Iterable[str]) -> _Folder:
    """Return what the folder of a class holds."""
    counts = Counter(image.rpartition(os.sep)[0] for image in paths)
    folders = [tuple(folder[len(path) + 1 :].split(os.sep)) if folder != path else () for folder in counts]
    depth = 0
    while len({parts[: depth + 1] for parts in folders}) == 1 and len(folders[0]) > depth:
        depth += 1
    inner = sorted({parts[depth] for parts in folders if len(parts) > depth})
    is_flat = any(len(parts) == depth for parts in folders)
    return _Folder(name, counts.total(), folders[0][:depth], tuple(inner), is_flat)


def table_hint(folder: str, files: Sequence[str], images: str) -> str:
    """Return how to use a CSV in the folder for the labels of the images in `images`."""
    tables = _tables(files) or ["TABLE.csv"]
    name = Path(images).name.lower()
    table = _join(folder, next((table for table in tables if name in table.lower()), tables[0]))
    images = escape_unprintable(os.path.normpath(os.path.join(folder, images)))
    return (
        f"If the labels are in a CSV, use --data.root {table} --data.csv_root {images}, with data.csv_suffix if its "
        "names have no extension."
    )


def _tables(files: Iterable[str]) -> list[str]:
    return [name for name in files if name.lower().endswith((".csv", ".tsv"))]


def _error(root: str, folders: Sequence[_Folder], problem: str, hint: str) -> UserError:
    shown = "".join(folder.describe() for folder in folders[:10])
    more = f"\n  and {len(folders) - 10} more" if len(folders) > 10 else ""
    return UserError(f"{_where(root)}: {escape_unprintable(problem)}:{shown}{more}\n{hint}")


def _where(root: str) -> str:
    return f"data.root {escape_unprintable(root)}"


def _join(root: str, name: str) -> str:
    return escape_unprintable(os.path.join(root, name))
