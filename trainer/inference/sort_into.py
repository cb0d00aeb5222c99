"""Copy or link predicted images into one folder for each class, without overwriting a file."""

import errno
import filecmp
import itertools
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

from trainer.errors import UserError
from trainer.inference.answers import UNKNOWN
from trainer.inference.rows import Row
from trainer.text import escape_unprintable

Mode = Literal["copy", "symlink", "hardlink"]
_MAX_NAME_BYTES = 200  # file systems allow 255; a number may be added
_NO_HARD_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


class ImageSorter:
    """Sorts images into `FOLDER/CLASS/`. A file that is there already with the same content is left as it is."""

    def __init__(self, folder: Path, classes: Iterable[str], mode: Mode) -> None:
        """Create the folder.

        Args:
            folder: holds the class folders.
            classes: class names, which may hold any characters.
            mode: whether to copy files, or to create symbolic or hard links to them.

        Raises:
            UserError: the folder cannot be created.

        """
        self._folder, self._mode = folder, mode
        self._names = class_folders([*classes, UNKNOWN])
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--sort-into {escape_unprintable(str(folder))}: the folder cannot be created ({error.strerror})"
            ) from None

    def add(self, row: Row) -> None:
        """Copy or link an image into the folder of its class; nothing is done with an image that cannot be read.

        Raises:
            UserError: the file cannot be written.

        """
        if row.prediction is None:
            return
        folder = self._folder / self._names[row.prediction.label]
        source = Path(row.path)
        stem = _shorten(source.stem, _MAX_NAME_BYTES - _size(source.suffix))
        try:
            folder.mkdir(exist_ok=True)
            for number in itertools.count(1):
                target = folder / (stem + (f"-{number}" if number > 1 else "") + source.suffix)
                if _create(source, target, self._mode) or _is_same(source, target, self._mode):
                    return
        except (OSError, UnicodeEncodeError) as error:  # UnicodeEncodeError: a locale whose encoding lacks a character
            reason = getattr(error, "strerror", None) or error
            raise UserError(
                f"--sort-into: {escape_unprintable(row.path)} cannot be written to {escape_unprintable(str(folder))} "
                f"({reason})"
            ) from None


def class_folders(classes: Iterable[str]) -> dict[str, str]:
    """Return class name -> name of its folder: without slashes and control characters, and different for each class."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for label in dict.fromkeys(classes):
        plain = re.sub(r"[/\\\x00-\x1f\x7f\ud800-\udc7f\udd00-\udfff]", "_", label).strip()
        plain = _shorten(re.sub(r"^\.+", "_", plain) or "_", _MAX_NAME_BYTES)
        numbered = (plain if number == 1 else f"{plain}-{number}" for number in itertools.count(1))
        # Some file systems do not tell upper from lower case.
        names[label] = next(name for name in numbered if name.casefold() not in taken)
        taken.add(names[label].casefold())
    return names


def _shorten(name: str, size: int) -> str:
    """Return the start of a name that has at most `size` bytes."""
    while name and _size(name) > size:
        name = name[:-1]
    return name


def _size(name: str) -> int:
    """Return the number of bytes, which does not depend on the locale."""
    return len(name.encode("utf-8", "surrogateescape"))


def _create(source: Path, target: Path, mode: Mode) -> bool:
    """Create the file, complete or not at all; return False if there is one already."""
    if os.path.lexists(target):
        return False
    try:
        if mode == "symlink":
            target.symlink_to(source.absolute())
        elif mode == "hardlink":
            target.hardlink_to(source.resolve())
        else:
            _copy(source, target)
    except FileExistsError:
        return False
    return True


def _copy(source: Path, target: Path) -> None:
    temporary = target.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        shutil.copy2(source, temporary)
        try:
            target.hardlink_to(temporary)  # unlike a rename, it never replaces a file
        except OSError as error:
            if error.errno not in _NO_HARD_LINKS or os.path.lexists(target):
                raise
            temporary.rename(target)
    finally:
        temporary.unlink(missing_ok=True)


def _is_same(source: Path, target: Path, mode: Mode) -> bool:
    """Return whether the target is what an earlier command has created from the source."""
    if mode == "symlink":
        return target.is_symlink() and target.readlink() == source.absolute()
    if mode == "hardlink":
        return target.exists() and target.samefile(source)
    return target.is_file() and not target.is_symlink() and filecmp.cmp(source, target, shallow=False)
