"""Describe what the folders of a dataset hold, and find those that are no classes: copies, masks, unnamed folders."""

# Paths are strings, as in the scan.
# ruff: noqa: PTH119, PTH122, PTH206

import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

_IMAGES = frozenset({"image", "images", "img", "imgs"})
_MASKS = frozenset({"masks", "annotations", "labels", "groundtruth", "gt", "segmentation", "segmentations", "trimaps"})
_MASKS_BESIDE_IMAGES = _MASKS | {"mask", "label", "annotation"}
_MASK_FOLDER = re.compile(r".*(?:groundtruth|annotations|trimaps)|segmentation(?:class|object|masks?)")
_PROJECT = frozenset(
    {"doc", "docs", "asset", "assets", "output", "outputs", "result", "results", "log", "logs", "plot", "plots"}
    | {"checkpoints", "notebooks", "scripts", "src"}
)
# What file managers and people add to the name of a copy; the rest of the name is the original's.
_COPY = re.compile(
    r"(?:copy|kopie|copie|copia)[ _](?:of|von|de)[ _](?P<original>.+)"
    r"|(?P<name>.+?)(?:[ _.-]+(?:copy|kopie|copie|copia|backup|bak|old|aug|augmented)[ _-]*\(?\d*\)?"
    r"|[ -]*副本|[ _]*\(\d{1,2}\)|~)",
    re.IGNORECASE,
)
_UNNAMED = re.compile(
    r"(?:new folder|untitled folder|neuer ordner|nouveau dossier|nueva carpeta|nuova cartella|新建文件夹) *\(?\d*\)?",
    re.IGNORECASE,
)
_MASK_FILE = re.compile(r"(?P<image>.+)[_ -](?:mask|segmentation)(?:[_ -]?\d+)?", re.IGNORECASE)
_MIN_MASKS = 0.1
"""Fraction of the images of a class that must be named as masks of others."""


class Folder(NamedTuple):
    """A folder that would be a class."""

    name: str
    images: int
    wrappers: tuple[str, ...]
    """Names of the folders that hold all of its images, one inside the other; often none."""
    inner: tuple[str, ...]
    """Names of the folders with images below these."""
    is_flat: bool
    """Whether there are images beside the inner folders."""

    @property
    def is_nested(self) -> bool:
        """Return whether all images are in several inner folders, as those of a split are."""
        return len(self.inner) > 1 and not self.is_flat


def summarize(path: str, name: str, paths: Sequence[str]) -> Folder:
    """Return what the folder `path` of a class holds, from the paths of its images."""
    if "".join(paths).count(os.sep) == len(paths) * (path.count(os.sep) + 1):  # as in most folders
        return Folder(name, len(paths), wrappers=(), inner=(), is_flat=True)
    counts = Counter(image[: image.rfind(os.sep)] for image in paths)
    folders = [tuple(folder[len(path) + 1 :].split(os.sep)) if folder != path else () for folder in counts]
    depth = 0
    while len({parts[: depth + 1] for parts in folders}) == 1 and len(folders[0]) > depth:
        depth += 1
    inner = sorted({parts[depth] for parts in folders if len(parts) > depth})
    is_flat = any(len(parts) == depth for parts in folders)
    return Folder(name, counts.total(), folders[0][:depth], tuple(inner), is_flat)


class Leftover(NamedTuple):
    """A folder or files that are probably no class."""

    problem: str
    remedy: str


def find_images_and_masks(folders: Iterable[Folder]) -> str | None:
    """Return what is wrong if the folders are those of a segmentation or detection dataset."""
    names = {_compact(folder.name) for folder in folders}
    if names & _IMAGES and names & _MASKS_BESIDE_IMAGES:
        return "the folders look like images and their masks or labels rather than classes"
    return None


def find_leftovers(folders: Sequence[Folder], images: Mapping[str, Sequence[str]]) -> Iterator[Leftover]:
    """Yield the leftovers among the folders (with class -> paths)."""
    by_lower_name = {folder.name.lower(): folder.name for folder in folders}
    for folder in folders:
        name = folder.name
        masks = [inner for inner in folder.inner if _compact(inner) in _MASKS_BESIDE_IMAGES]
        if masks and (folder.is_flat or len(folder.inner) > 1):
            problem = f"{name}/{masks[0]}/ looks like masks or labels of the other images of the class"
            yield Leftover(problem, "Move such folders away, or list the images in a CSV.")
        if _compact(name) in _MASKS or _MASK_FOLDER.fullmatch(_compact(name)):
            yield Leftover(f"{name}/ looks like masks or labels rather than a class", "Move it away.")
        if name.lower() in _PROJECT and len(folders) > 2:
            yield Leftover(f"{name}/ looks like a folder of a project rather than a class", "Move it away.")
        if _UNNAMED.fullmatch(name):
            yield Leftover(f"{name}/ has the name of a new folder", "Rename it to the class, or move it away.")
        copy = _COPY.fullmatch(name)
        original = copy and by_lower_name.get((copy["original"] or copy["name"]).lower())
        if original:
            yield Leftover(f"{name}/ looks like a copy of {original}/ rather than a class", "Merge or remove it.")
        for inner in folder.inner:
            other = by_lower_name.get(inner.lower())
            if other and not inner.isdigit() and (other != name or folder.is_flat):
                problem = f"{name}/{inner}/ has the name of the class {other}/, but its images would be of class {name}"
                yield Leftover(problem, "Move it to the class that it belongs to, or remove it if it is a copy.")
    for name, paths in images.items():
        if masks := _mask_files(paths):
            problem = f"{name}/ holds {len(masks)} files named as masks of other images, such as {masks[0]}"
            yield Leftover(problem, "Move the masks away.")


def _mask_files(paths: Sequence[str]) -> list[str]:
    """Return the names of the files that are named as masks of other images, if there are many."""
    lower = "\n".join(paths).lower()
    if "mask" not in lower and "segmentation" not in lower:
        return []
    named = [path for path in paths if "mask" in path.lower() or "segmentation" in path.lower()]
    masks = {path: match["image"] for path in named if (match := _MASK_FILE.fullmatch(_stem(path)))}
    if not masks:
        return []
    stems = set(map(_stem, paths))
    found = [os.path.basename(path) for path, image in masks.items() if image in stems]
    return found if len(found) >= _MIN_MASKS * len(paths) else []


def _stem(path: str) -> str:
    """Return the path without its extension."""
    return os.path.splitext(path)[0]


def _compact(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())
