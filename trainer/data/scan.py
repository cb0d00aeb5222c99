"""What lies in a folder: class folders, images, and what is passed over, each counted.

Plain strings and `os.scandir` instead of one `Path` for every file: a million files are listed in seconds.
"""

# A Path for each of a million files takes longer than listing them.
# ruff: noqa: PTH116, PTH118, PTH122

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

from trainer.errors import UserError
from trainer.text import escape_unprintable

# What systems and archivers leave behind; like names with a leading dot, never meant as data.
_LITTER = frozenset({"__macosx", "thumbs.db", "desktop.ini"})


class Level(NamedTuple):
    """One folder's own entries, without those of the folders in it; names only, sorted."""

    folders: list[str]
    files: list[str]
    """Everything that is no folder: broken links and pipes too, so that the check of images names them."""
    hidden: int
    """Entries that begin with a dot, or that a system left behind."""


@dataclass
class Scan:
    """A walk through the class folders of one data set, and what it has passed over so far."""

    extensions: tuple[str, ...]
    """File name endings taken for images, with their dot, lower case."""
    others: Counter[str] = field(default_factory=Counter)
    """Ending, lower case -> files passed over for it."""
    hidden: int = 0
    """Entries that begin with a dot, or that a system left behind."""
    repeated: int = 0
    """Folders that a link led to again, and that were not entered again."""
    _owners: dict[tuple[int, int], str] = field(default_factory=dict)
    """Device and inode of a folder -> the class folder it was entered for; "": it lies above them."""

    def above(self, folder: str) -> Level:
        """Return the entries of a folder that holds the class folders; a link back to it is a loop.

        Raises:
            UserError: it cannot be read.

        """
        self._owners[_identity(folder)] = ""
        level = look(folder)
        self.hidden += level.hidden
        return level

    def images(self, folder: str) -> tuple[list[str], Counter[str]]:
        """Return the images in and below a class folder, and the endings of its other files.

        The order is that of torchvision's ImageFolder: folders by their path, then files by their name.
        Links are followed, and each folder is entered once: a link to a folder above would never end.

        Raises:
            UserError: a folder that cannot be read, or that belongs to another class or part too.

        """
        found: list[tuple[str, list[str]]] = []
        others: Counter[str] = Counter()
        waiting = [folder]
        while waiting:
            current = waiting.pop()
            if not self._enter(current, folder):
                continue
            level = look(current)
            self.hidden += level.hidden
            waiting += [os.path.join(current, name) for name in reversed(level.folders)]
            images = []
            for name in level.files:
                if self.is_image(name):
                    images.append(os.path.join(current, name))
                else:
                    others[ending(name)] += 1
            found.append((current, images))
        self.others += others
        return [path for _, images in sorted(found) for path in images], others

    def is_image(self, name: str) -> bool:
        """Return whether a file is taken for an image, by its name."""
        return name.lower().endswith(self.extensions)

    def _enter(self, folder: str, class_folder: str) -> bool:
        """Return whether this is the first time that `folder` is come upon."""
        identity = _identity(folder)
        owner = self._owners.get(identity)
        if owner is None:
            self._owners[identity] = class_folder
            return True
        if owner not in ("", class_folder):
            raise UserError(
                f"{escape_unprintable(owner)} and {escape_unprintable(folder)} hold, through a link, the same folder: "
                "its images would count for both. Remove the link, or put other images in its place"
            )
        self.repeated += 1
        return False


def look(folder: str) -> Level:
    """Return the entries of one folder.

    Raises:
        UserError: it cannot be read.

    """
    folders, files, hidden = [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in _LITTER:
                    hidden += 1
                elif _is_folder(entry):
                    folders.append(entry.name)
                else:
                    files.append(entry.name)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return Level(sorted(folders), sorted(files), hidden)


def ending(name: str) -> str:
    """Return a file's ending for a reader, as in `.gif`."""
    return os.path.splitext(name)[1].lower() or "without an ending"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def _identity(folder: str) -> tuple[int, int]:
    try:
        status = os.stat(folder)
    except OSError as error:
        raise _unreadable(folder, error) from None
    return status.st_dev, status.st_ino


def _unreadable(folder: str, error: OSError) -> UserError:
    return UserError(
        f"{escape_unprintable(folder)}: the folder cannot be read ({error.strerror}). Make it readable, or move it "
        "away"
    )
