"""Find the image files that the rows of a CSV name."""

# Creating a Path for each of a million rows would take longer than reading them.
# ruff: noqa: PTH116, PTH118, PTH119, PTH120, PTH122

import os
import re
import stat
import unicodedata
from functools import cached_property

from trainer.data.system_files import is_hidden
from trainer.text import escape_unprintable, has_invalid_utf8, join_truncated

_MAX_FOLDERS_FOR_HINT = 1000


class ImageFiles:
    """The image files below a folder."""

    def __init__(self, folder: str, *, suffix: str, search: bool) -> None:
        """Create the lookup.

        Args:
            folder: folder that relative paths start from.
            suffix: extension to add to paths that do not end with it.
            search: whether to look for a name without a folder in the subfolders too.

        """
        self._folder, self._suffix, self._search = folder, suffix, search
        self._foreign_root: list[str] | None = None  # where the paths of another machine start, once one is found

    def find(self, name: str) -> tuple[str, tuple[int, int]]:
        r"""Return the path of an image, and the device and inode of the file.

        A path with backslashes that is not the name of a file is read as a path of Windows.

        Raises:
            FileNotFoundError: there is no such file; the message says why.

        """
        if not name:
            raise FileNotFoundError("the path is empty")
        complete = name if name.endswith(self._suffix) else name + self._suffix
        path = os.path.join(self._folder, complete)
        identity = _identity(path)
        if not identity and "\\" in complete:
            path = os.path.join(self._folder, complete.replace("\\", "/"))
            identity = _identity(path)
        if identity:
            return path, identity
        if self._search:
            found = self._search_for(complete)
            if found and (identity := _identity(found)):
                return found, identity
        raise FileNotFoundError(self._explain(name, complete))

    def _search_for(self, name: str) -> str | None:
        """Return the path of an image below the folder: by its name alone, or by the end of a path of another machine.

        Raises:
            FileNotFoundError: several files have the name.

        """
        if _is_foreign(name):
            parts = _split(name)
            for count in range(len(parts)):
                path = os.path.join(self._folder, *parts[count:])
                if self._foreign_root in (None, parts[:count]) and ".." not in parts and _identity(path):
                    self._foreign_root = parts[:count]
                    return path
            return None
        paths = self._paths.get(name, [])
        if len(paths) > 1:
            raise FileNotFoundError(f"{len(paths)} files have this name: {join_truncated(paths, limit=3)}")
        return paths[0] if paths else None

    @cached_property
    def _paths(self) -> dict[str, list[str]]:
        """File name -> paths below the folder."""
        paths: dict[str, list[str]] = {}
        for folder, subfolders, names in os.walk(self._folder):
            subfolders[:] = [name for name in subfolders if not is_hidden(name)]
            for name in names:
                paths.setdefault(name, []).append(os.path.join(folder, name))
        return paths

    def _explain(self, name: str, complete: str) -> str:
        path = os.path.join(self._folder, complete)
        if name != name.strip():
            exists = _identity(os.path.join(self._folder, name.strip() + complete[len(name) :])) is not None
            hint = "; there is one without the spaces" if exists else ""
            return f"no such file: '{escape_unprintable(path)}' (the path begins or ends with spaces{hint})"
        hint = " (a URL, but images must be files)" if "://" in name else ""
        hint = " (its name is not UTF-8: was the CSV saved as UTF-8?)" if has_invalid_utf8(name) else hint
        if name[1:3] == ":\\":
            hint = " (a path of Windows: write it relative to data.csv_root)"
        return f"no such file: {escape_unprintable(path)}{hint}"

    def hint(self, name: str) -> str:
        """Return how to set `data.csv_root` and `data.csv_suffix` to find a name, if a file has it."""
        *folders, base = _split(name) or [""]
        similar = ""
        for count, (folder, subfolders, names) in enumerate(os.walk(self._folder)):
            subfolders[:] = sorted(name for name in subfolders if not is_hidden(name))
            for found in sorted(names) if base else ():
                path = escape_unprintable(os.path.join(folder, found))
                if found == base or os.path.splitext(found)[0] == base:
                    if found != base and self._suffix:
                        return f"\n{path} exists, but data.csv_suffix is {self._suffix}"
                    root = folder
                    while folders and os.path.basename(root) == folders[-1]:
                        root = os.path.dirname(root)
                        folders.pop()
                    if folders and not _is_foreign(name):
                        return f"\n{path} exists, but in another folder: correct the paths"
                    suffix = f" and data.csv_suffix to {found[len(base) :]}" if found != base else ""
                    return f"\n{path} exists: set data.csv_root to {escape_unprintable(root)}{suffix}"
                if unicodedata.normalize("NFC", found).lower() == unicodedata.normalize("NFC", base).lower():
                    similar = f"\n{path} exists, which differs in case or in the Unicode encoding of accents"
            if count == _MAX_FOLDERS_FOR_HINT:
                break
        return similar


def _is_foreign(name: str) -> bool:
    """Return whether a path is absolute, of Windows, or a URL."""
    return re.match(r"/|\\\\|[A-Za-z]:[\\/]|[A-Za-z][A-Za-z0-9]+://", name) is not None


def _split(name: str) -> list[str]:
    return [part for part in re.split(r"[\\/]+", name) if part not in ("", ".")]


def _identity(path: str) -> tuple[int, int] | None:
    """Return device and inode of a regular file, or None if there is none."""
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        return None
    return (status.st_dev, status.st_ino) if stat.S_ISREG(status.st_mode) else None
