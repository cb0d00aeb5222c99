"""Find the folders of the splits of a dataset: by their names, by what they hold, or as the user names them."""

# Paths are joined as strings, as ImageFolder does.
# ruff: noqa: PTH112, PTH118, PTH119

import os
from collections.abc import Callable, Iterable, Mapping, Sequence

from trainer.data.folders.scan import DirEntries, scan_dir, top_folder
from trainer.data.split_names import is_wrapper, share_names, split_kinds
from trainer.errors import UserError
from trainer.text import escape_unprintable


def find_split_folders(
    root: str, top: DirEntries, is_image: Callable[[str], bool], given: Mapping[str, str]
) -> dict[str, str]:
    """Return split -> the folder that holds its class folders, as a path relative to `root` or absolute.

    Args:
        root: folder of the dataset.
        top: entries of `root`.
        is_image: whether a file name is that of an image.
        given: split -> the folder that the user names for it. If train is among them, no other splits are looked for.

    Returns:
        The splits; {"train": "."} if the folders of `root` are not splits.

    Raises:
        UserError: there is no such folder, two folders of one split, or a folder that may be one.

    """
    folders = _given_folders(root, given)
    if "train" not in folders:
        folders = _find_by_name(root, top, is_image, folders) | folders
    if given and "train" not in folders:
        raise UserError(
            f"data.root {escape_unprintable(root)}: {_option(next(iter(folders)))} is set, but there is no train/ with "
            "class folders: set data.train_dir to the folder of the training images"
        )
    return folders or {"train": "."}


def _given_folders(root: str, split_dirs: Mapping[str, str]) -> dict[str, str]:
    """Return split -> folder for those that the user names."""
    folders = {}
    for split, given in split_dirs.items():
        path = os.path.normpath(os.path.join(root, given))
        relative = os.path.relpath(path, root)
        folder = path if relative.startswith("..") else relative
        if not os.path.isdir(path):
            raise UserError(
                f"{_option(split)} is {given!r}: there is no such folder in data.root {escape_unprintable(root)}"
            )
        folders[split] = folder if folder == "." else _unwrap(root, folder)
    if len(set(folders.values())) < len(folders):
        raise UserError(f"{' and '.join(map(_option, folders))} name the same folder: set each to another")
    return folders


def _find_by_name(
    root: str, top: DirEntries, is_image: Callable[[str], bool], given: Mapping[str, str]
) -> dict[str, str]:
    """Return split -> its folder below `root`; empty if the folders of `root` are not splits.

    A folder named train is a split if it holds class folders, and a class (of vehicles, say) if it holds images.
    If it holds both, it is a split if another split has class folders of the same names, or if all folders of
    `root` have names of splits.
    """
    kinds = split_kinds(top.folders)
    named: dict[str, list[str]] = {}
    for name, kind in kinds.items():
        if kind not in given and name not in map(top_folder, given.values()):
            named.setdefault(kind, []).append(_unwrap(root, name))
    entries = {folder: scan_dir(os.path.join(root, folder)) for folders in named.values() for folder in folders}
    eval_folders = [*named.get("val", ()), *named.get("test", ())]
    eval_classes = {name for folder in eval_folders for name in entries[folder].folders}

    def holds_classes(folder: str) -> bool:
        inner = entries[folder]
        has_images = any(map(is_image, inner.files))
        is_split = len(kinds) == len(top.folders) or not has_images or not eval_classes.isdisjoint(inner.folders)
        return bool(inner.folders) and is_split

    if not any(map(holds_classes, named.get("train", ()))):
        return {}
    named.pop("unlabeled", None)
    if any(entries[folder].folders for folder in named.get("val", ())):
        # ImageNet and Kaggle have a test split without labels: with a validation split, it is not needed.
        named["test"] = [folder for folder in named.get("test", ()) if entries[folder].folders]
    for split, folders in named.items():
        if len(folders) > 1:
            raise UserError(
                f"data.root {escape_unprintable(root)}: {' and '.join(f'{name}/' for name in folders)} are the "
                f"same split, {split}. Keep one, merge them, or set data.train_dir, data.val_dir and data.test_dir"
            )
    splits = {split: folders[0] for split, folders in named.items() if folders}
    classes = entries[splits["train"]].folders
    others = [_unwrap(root, name) for name in top.folders if name not in (*kinds, *map(top_folder, given.values()))]
    _check_other_folders(root, splits["train"], classes, others, is_image)
    return splits


def _unwrap(root: str, folder: str) -> str:
    """Return the folder that holds the class folders of a split: wrappers such as `train/train/` are followed."""
    while True:
        entries = scan_dir(os.path.join(root, folder))
        if len(entries.folders) != 1 or not is_wrapper(entries.folders[0], os.path.basename(folder)):
            return folder
        folder = os.path.join(folder, entries.folders[0])


def _option(split: str) -> str:
    return f"data.{split}_dir"


def _check_other_folders(
    root: str, train: str, classes: Sequence[str], others: Iterable[str], is_image: Callable[[str], bool]
) -> None:
    """Raise a UserError if a folder beside the training split has its class folders, but not the name of a split."""
    for name in others:
        inner = scan_dir(os.path.join(root, name)).folders
        if share_names(inner, classes) and any(_has_image(os.path.join(root, name, c), is_image) for c in inner):
            raise UserError(
                f"data.root {escape_unprintable(root)}: {escape_unprintable(name)}/ holds the class folders of "
                f"{escape_unprintable(train)}/, but its name is not that of a split. Set data.train_dir, and "
                "data.val_dir or data.test_dir to the folders to evaluate on; others are then ignored"
            )


def _has_image(folder: str, is_image: Callable[[str], bool]) -> bool:
    return any(is_image(name) for _, _, names in os.walk(folder) for name in names)
