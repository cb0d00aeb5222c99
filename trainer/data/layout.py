"""Which layout a folder has, and what it lists: parts with class folders in them, or class folders alone."""

# Names are joined as ImageFolder joins them, as strings.
# ruff: noqa: PTH118

import os
from collections import Counter
from typing import NamedTuple

from trainer.data.scan import Level, Scan, ending, look
from trainer.data.split import Images
from trainer.data.table import PARTS
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

# Names that people give to parts, and hardly to classes; those of PARTS are understood.
_LIKE_PARTS = frozenset({*PARTS, "training", "testing", "eval", "evaluation", "dev"})
_DEEPEST_HINT = 5
_EXPECTED = (
    "Expected train/ with one folder per class, and val/ or test/ likewise if there are any; or one folder "
    "per class; or a CSV with the header path,label,split"
)


class Listing(NamedTuple):
    """The images of a data set, before any split is drawn."""

    parts: dict[str, Images]
    """train, and val and test where they are given -> class -> paths."""
    names: dict[str, str]
    """Part -> where its images lie, for a reader."""
    notes: list[str]


def read_folder(root: str, extensions: tuple[str, ...]) -> Listing:
    """Return what a data set's folder holds.

    Raises:
        UserError: a layout that is not understood, a folder that cannot be read, or a training class folder
            without an image.

    """
    scan = Scan(tuple(name.lower() for name in extensions))
    top = scan.above(root)
    notes: list[str] = []
    folders = _part_folders(root, top, scan)
    if folders:
        names = {part: f"{folder}/" for part, folder in folders.items()}
        parts = {}
        for part, folder in sorted(folders.items(), key=lambda item: item[0] != "train"):  # train first
            path = os.path.join(root, folder)
            level = scan.above(path)
            if not level.folders:
                raise UserError(
                    f"{escape_unprintable(path)}: no class folders in it, so its {len(level.files)} files have no "
                    f"label. Sort them into folders named as those of {names['train']}, or move it away"
                )
            parts[part] = _read_classes(path, level, scan, training=part == "train")
            notes += _strays(names[part], level)
        beside = [f"{name}/" for name in top.folders if name not in folders.values()]
        notes += [f"passed over beside {names['train']}: {join_truncated(beside)}"] if beside else []
    else:
        _check_class_folders(root, top, scan)
        names, parts = {"train": "the folder"}, {"train": _read_classes(root, top, scan, training=True)}
    return Listing(parts, names, [*notes, *_strays("the folder", top), *_passed_over(scan)])


def _part_folders(root: str, top: Level, scan: Scan) -> dict[str, str]:
    """Return part -> the name of its folder; empty where `root` is not cut into parts.

    A folder called train is a part if class folders lie in it, and a class (of vehicles, say) if it holds
    images. Where it holds both, it is a part if another one holds folders of the same names, or if nothing
    but parts lies beside it.
    """
    named: dict[str, list[str]] = {}
    for name in top.folders:
        if name.lower() in PARTS:
            named.setdefault(PARTS[name.lower()], []).append(name)
    levels = {part: [look(os.path.join(root, name)) for name in folders] for part, folders in named.items()}
    evaluated = {name for part in ("val", "test") for level in levels.get(part, []) for name in level.folders}
    only_parts = all(name.lower() in PARTS for name in top.folders)
    if not any(
        level.folders and (only_parts or not _images(level, scan) or not evaluated.isdisjoint(level.folders))
        for level in levels.get("train", [])
    ):
        return {}
    for part, names in named.items():
        if len(names) > 1:
            raise UserError(
                f"data.root {escape_unprintable(root)}: {' and '.join(f'{name}/' for name in names)} stand for the "
                f"same part, {part}. Keep one of them, or join them"
            )
    return {part: names[0] for part, names in named.items()}


def _read_classes(folder: str, level: Level, scan: Scan, *, training: bool) -> Images:
    """Return class folder -> its images."""
    images: Images = {}
    empty: list[str] = []
    for name in level.folders:
        if any("\udc80" <= character <= "\udcff" for character in name):
            raise UserError(
                f"{escape_unprintable(os.path.join(folder, name))}: the name of a class folder is not UTF-8, so the "
                "class could not be written into the model file. Rename the folder"
            )
        images[name], others = scan.images(os.path.join(folder, name))
        if not images[name]:
            empty.append(f"\n  {escape_unprintable(name)}/ holds {_counted(others) or 'no files'}")
    if training and empty:
        shown = "".join(empty[:10]) + (f"\n  and {len(empty) - 10} more" if len(empty) > 10 else "")
        raise UserError(
            f"{escape_unprintable(folder)}: {len(empty)} of {len(level.folders)} class folders hold no image:{shown}\n"
            f"data.extensions takes {' '.join(scan.extensions)} for images: add an ending there, fill the "
            "folders, or remove them"
        )
    return images


def _check_class_folders(root: str, top: Level, scan: Scan) -> None:
    """Raise a UserError unless the folders of `root` can be its classes."""
    shown = f"data.root {escape_unprintable(root)}"
    if not top.folders:
        found = (
            f"{_images(top, scan)} images and no folders"
            if _images(top, scan)
            else "no folders and no images"
        )
        others = _counted(Counter(ending(name) for name in top.files if not scan.is_image(name)))
        raise UserError(f"{shown}: holds {found}" + (f" ({others})" if others else "") + f". {_EXPECTED}")
    alike = [name for name in top.folders if name.lower() in _LIKE_PARTS]
    if (
        len(alike) == len(top.folders)
        or sum(_only_folders(os.path.join(root, name), scan) for name in alike) > 1
    ):
        raise UserError(
            f"{shown}: {join_truncated(f'{name}/' for name in alike)} look like parts of a data set rather than "
            f"classes, but there is no train/ with class folders. {_EXPECTED}"
        )
    if len(top.folders) == 1:
        inner = _inner(os.path.join(root, top.folders[0]), scan)
        if inner is not None:
            raise UserError(
                f"{shown}: holds a single folder, {escape_unprintable(top.folders[0])}/, so there would be one class. "
                f"If that is the data set, give --data.root {escape_unprintable(inner)}"
            )


def _inner(folder: str, scan: Scan) -> str | None:
    """Return the first folder from here down that holds more than a single folder: a data set, wrapped up."""
    for _ in range(_DEEPEST_HINT):
        level = look(folder)
        if len(level.folders) > 1 or any(name.lower() in PARTS for name in level.folders):
            return folder
        if not level.folders or _images(level, scan):
            return None
        folder = os.path.join(folder, level.folders[0])
    return None


def _images(level: Level, scan: Scan) -> int:
    return sum(map(scan.is_image, level.files))


def _only_folders(folder: str, scan: Scan) -> bool:
    level = look(folder)
    return bool(level.folders) and not _images(level, scan)


def _strays(name: str, level: Level) -> list[str]:
    count = len(level.files)
    return [f"files of {name} that lie in no class folder, passed over: {count}"] if count else []


def _passed_over(scan: Scan) -> list[str]:
    notes = []
    if scan.others:
        endings = " ".join(scan.extensions)
        notes.append(
            f"files passed over by their ending: {_counted(scan.others)} (data.extensions takes {endings})"
        )
    if scan.hidden:
        notes.append(f"hidden files and folders passed over: {scan.hidden}")
    if scan.repeated:
        notes.append(f"links to a folder that was read already, passed over: {scan.repeated}")
    return notes


def _counted(endings: Counter[str]) -> str:
    most_first = sorted(endings.items(), key=lambda item: (-item[1], item[0]))
    return join_truncated((f"{count} {name}" for name, count in most_first), limit=8)
