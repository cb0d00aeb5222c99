"""Cache of the entries of dataset folders: a folder that has not changed is not scanned again."""

# Creating a Path for each folder would take longer than reading its entries from the cache.
# ruff: noqa: PTH100, PTH116

import hashlib
import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

from trainer.data.folders.scan import DirEntries, scan_dir
from trainer.run.atomic import write_text_atomically

FORMAT = 1
MIN_AGE_SECONDS = 2.0
"""Seconds since the last change of a folder before it is cached. A change that follows within one tick of the file
system's clock would leave the times of the folder as they are."""


class FolderVersion(NamedTuple):
    """What the file system says about the entries of a folder. A new, removed or renamed entry changes the times."""

    device: int
    inode: int
    mtime_ns: int
    ctime_ns: int
    """Time of the last change [ns], which only the file system sets."""


class _Cached(NamedTuple):
    """The entries of a folder. Names are joined by slashes, which takes a third of the memory."""

    version: FolderVersion
    folders: str
    files: str
    hidden: int


class FolderCache:
    """Entries of the folders of one dataset. Folders with links are always scanned: a link's target may change."""

    def __init__(self, file: Path, root: str, cached: dict[str, _Cached]) -> None:
        """Create the cache of the folders below `root`; `read` reads it from its file."""
        self._file, self._root = file, root
        self._cached = cached
        self._current: dict[str, _Cached] = {}

    @classmethod
    def read(cls, folder: Path, root: str) -> Self:
        """Return the cache of a dataset; it is empty if its file in `folder` is missing or damaged."""
        absolute = os.path.abspath(root)
        file = folder / "folders" / f"{hashlib.sha256(os.fsencode(absolute)).hexdigest()[:24]}.json"
        try:
            content = json.loads(file.read_text(encoding="ascii"))
            is_ours = content["format"] == FORMAT and content["root"] == absolute
            cached = {name: _parse(entry) for name, entry in content["folders"].items()} if is_ours else {}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
            cached = {}
        return cls(file, root, cached)

    def scan_dir(self, folder: str) -> DirEntries:
        """Return the entries of a folder below the root.

        Raises:
            UserError: the folder cannot be read.

        """
        name = folder.removeprefix(self._root)
        version = _read_version(folder)
        cached = self._cached.get(name)
        if cached is not None and cached.version == version:
            self._current[name] = cached
            return DirEntries(_split(cached.folders), _split(cached.files), cached.hidden, has_links=False)
        entries = scan_dir(folder)
        if version is not None and not entries.has_links and _age_seconds(version) > MIN_AGE_SECONDS:
            self._current[name] = _Cached(version, "/".join(entries.folders), "/".join(entries.files), entries.hidden)
        return entries

    def has_files(self, folder: str) -> bool:
        """Return whether a folder is cached, has not changed, and has files that are not hidden."""
        cached = self._cached.get(folder.removeprefix(self._root))
        return cached is not None and cached.files != "" and cached.version == _read_version(folder)

    def write(self) -> None:
        """Write the entries of the folders that were scanned, if any of them has changed."""
        if self._current == self._cached:
            return
        content = {"format": FORMAT, "root": os.path.abspath(self._root), "folders": self._current}
        with suppress(OSError):  # without the cache, the next start scans all folders
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text_atomically(self._file, json.dumps(content))


def _read_version(folder: str) -> FolderVersion | None:
    try:
        status = os.stat(folder)
    except OSError:  # reported by the scan
        return None
    return FolderVersion(status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns)


def _age_seconds(version: FolderVersion) -> float:
    return time.time() - max(version.mtime_ns, version.ctime_ns) / 1e9


def _split(names: str) -> list[str]:
    return names.split("/") if names else []


def _parse(entry: Any) -> _Cached:
    version, folders, files, hidden = entry
    numbers = (*version, hidden)
    if not (len(version) == 4 and all(type(number) is int for number in numbers)):
        raise TypeError(f"not the version of a folder: {version!r}")
    if not (isinstance(folders, str) and isinstance(files, str)):
        raise TypeError("not the names of a folder")
    return _Cached(FolderVersion(*version), folders, files, hidden)
