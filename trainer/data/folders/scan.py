"""Scan a dataset folder for class folders and images; count the entries that are ignored.

Paths are plain strings from `os.scandir`: a million files are listed in seconds.
"""

# Creating a Path for each of a million files would take longer than listing them.
# ruff: noqa: PTH116, PTH118, PTH122, PTH208

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from regraft.contract import (
    ATTEMPTS,
    CONFIG,
    OUTPUT_IMAGES,
    OUTPUT_MARK,
    RUN_SUBFOLDERS,
    holds_only_output,
    is_in_default_run_folder,
    is_run_folder,
)
from trainer.data.system_files import is_hidden
from trainer.errors import UserError
from trainer.text import escape_unprintable

_VIRTUAL_ENVIRONMENT = "pyvenv.cfg"
"""File of a virtual environment of Python, whose packages hold images."""


class DirEntries(NamedTuple):
    """Names of the entries of one folder, sorted; entries of its subfolders are not included."""

    folders: list[str]
    files: list[str]
    """All other entries; includes broken links and pipes, which the image validation reports."""
    hidden: int
    """Number of entries that begin with a dot or are system files."""
    has_links: bool
    """Whether an entry is a symbolic link."""


def scan_dir(folder: str) -> DirEntries:
    """Return the entries of one folder.

    Raises:
        UserError: the folder cannot be read.

    """
    folders, files, hidden, has_links = [], [], 0, False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                has_links |= entry.is_symlink()
                if is_hidden(entry.name):
                    hidden += 1
                elif _is_dir(entry):
                    folders.append(entry.name)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return DirEntries(sorted(folders), sorted(files), hidden, has_links)


@dataclass
class Scan:
    """Scan the class folders of one dataset; count what is ignored."""

    extensions: tuple[str, ...]
    """File extensions of images, in lower case with their dot."""
    scan_dir: Callable[[str], DirEntries] = scan_dir
    """Returns the entries of a class folder; raises a UserError if it cannot be read."""
    has_files: Callable[[str], bool] = lambda folder: False
    """Returns whether a folder is known to have files that are not hidden, without reading it."""
    ignored: Counter[str] = field(default_factory=Counter)
    """File extension in lower case -> number of files ignored because of it."""
    hidden: int = 0
    """Number of entries that begin with a dot or are system files."""
    outputs: list[str] = field(default_factory=list)
    """Folders that are ignored because regraft wrote them."""
    repeated: int = 0
    """Number of links to folders that were scanned before; these are not entered again."""
    _owners: dict[tuple[int, int], str] = field(default_factory=dict)
    """Device and inode of a folder -> the class folder that contains it; "" for parents of class folders."""

    def scan_parent(self, folder: str) -> DirEntries:
        """Return the entries of a folder that contains the class folders, without regraft's output.

        Raises:
            UserError: the folder cannot be read, or a folder holds a run and other images.

        """
        self._owners[_identity(folder)] = ""
        entries = scan_dir(folder)
        self.hidden += entries.hidden
        outputs = [name for name in entries.folders if self._is_output(os.path.join(folder, name))]
        for name in outputs:
            self._check_output(os.path.join(folder, name))
        if is_run_folder(folder):  # run.dir is the folder of the dataset
            outputs += [name for name in entries.folders if name in RUN_SUBFOLDERS or name.startswith("earlier-")]
        self.outputs += [os.path.join(folder, name) for name in outputs]
        return entries._replace(folders=[name for name in entries.folders if name not in outputs])

    def find_images(self, class_folder: str) -> tuple[list[str], Counter[str]]:
        """Return the images in a class folder and its subfolders, and the extensions of the other files.

        The order is that of torchvision's ImageFolder: by folder path, then by file name. Links are followed.
        Each folder is entered once, because a link to a parent folder would never end.

        Raises:
            UserError: a folder cannot be read, or belongs to another class or split too.

        """
        found: list[tuple[str, list[str]]] = []
        ignored: Counter[str] = Counter()
        pending = [class_folder]
        while pending:
            folder = pending.pop()
            if not self._enter(folder, class_folder):
                continue
            if is_run_folder(folder):
                self.outputs.append(folder)
                continue
            entries = self.scan_dir(folder)
            self.hidden += entries.hidden
            if _VIRTUAL_ENVIRONMENT in entries.files:
                self.hidden += 1
                continue
            pending += [os.path.join(folder, name) for name in reversed(entries.folders)]
            images = entries.files
            if not self.are_images(images):
                images = [name for name in entries.files if self.is_image(name)]
                ignored.update(file_extension(name) for name in entries.files if not self.is_image(name))
            prefix = os.path.join(folder, "")
            found.append((folder, [prefix + name for name in images]))
        self.ignored += ignored
        return [path for _, images in sorted(found) for path in images], ignored

    def _is_output(self, folder: str) -> bool:
        """Return whether regraft wrote all of a folder, without reading a large folder that is known to have files."""
        if self.has_files(folder) and not is_in_default_run_folder(folder):
            return is_run_folder(folder)
        return holds_only_output(folder)

    def _check_output(self, folder: str) -> None:
        """Raise a UserError if a folder that regraft writes to, but has not created, holds other images: a class."""
        if not is_run_folder(folder) or OUTPUT_MARK in os.listdir(folder):
            return
        images = [name for name in scan_dir(folder).files if self.is_image(name) and name not in OUTPUT_IMAGES]
        if images:
            raise UserError(
                f"{escape_unprintable(folder)}: holds a run of regraft and {len(images)} other images, such as "
                f"{escape_unprintable(images[0])}. Move the run ({CONFIG}, {ATTEMPTS}/, ...) or the images away, and "
                "set run.dir to a folder of its own"
            )

    def is_image(self, name: str) -> bool:
        """Return whether the file name has the extension of an image."""
        return name.lower().endswith(self.extensions)

    def are_images(self, names: Sequence[str]) -> bool:
        """Return whether `is_image` is true for all file names; fast if they have the same extension."""
        first = names[0].lower() if names else ""
        extension = next((extension for extension in self.extensions if first.endswith(extension)), None)
        if extension is not None and f"{'/'.join(names)}/".lower().count(f"{extension}/") == len(names):
            return True
        return all(map(self.is_image, names))

    def _enter(self, folder: str, class_folder: str) -> bool:
        """Return whether `folder` is seen for the first time."""
        identity = _identity(folder)
        owner = self._owners.get(identity)
        if owner is None:
            self._owners[identity] = class_folder
            return True
        if owner not in ("", class_folder):
            raise UserError(
                f"{escape_unprintable(owner)} and {escape_unprintable(folder)} contain the same folder through a link: "
                "its images would count for both. Remove the link, or replace it by other images"
            )
        self.repeated += 1
        return False


def file_extension(name: str) -> str:
    """Return the extension of a file for a message, such as `.gif`."""
    return os.path.splitext(name)[1].lower() or "without an extension"


def top_folder(folder: str) -> str:
    """Return the first folder of a relative path."""
    return folder.split(os.sep, maxsplit=1)[0]


def _is_dir(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str) -> tuple[int, int]:
    """Return device and inode."""
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _unreadable(folder: str, error: OSError) -> UserError:
    return UserError(
        f"{escape_unprintable(folder)}: the folder cannot be read ({error.strerror}). Change its permissions or move it"
    )
