"""The packs in a folder: several runs and machines may read, add and evict them at the same time.

A pack is written under a temporary name and renamed when it is complete. Its writer and its readers hold a lock on its
file (flock), which the kernel releases when a process ends: an unlocked temporary file is a leftover, and an unlocked
pack may be evicted.
"""

import errno
import fcntl
import os
import secrets
import shutil
import time
from contextlib import suppress
from pathlib import Path

from trainer.data.image_cache.pack import DamagedPackError, Pack, read_index
from trainer.text import escape_unprintable

PACK_BYTES = 256 * 2**20
"""Size at which a pack is complete [bytes]; an interrupted build keeps its complete packs."""
MAX_PACKS = 512
"""Most packs of a folder: every start reads the index of each, and a run keeps those that it uses open."""
_UNUSED_SECONDS = 24 * 3600  # time without a change after which a file is removed, on a file system without locks


class PackFolder:
    """A folder of packs."""

    def __init__(self, folder: Path, *, max_bytes: int | None = None) -> None:
        """Create the object; `create` creates the folder.

        Args:
            folder: the folder.
            max_bytes: most bytes of all packs; None is as much as stays free on the disk.

        """
        self.folder, self._max_bytes = folder, max_bytes
        self._published: set[Path] = set()

    def read_packs(self) -> tuple[list[Pack], list[str]]:
        """Return the packs, and a message for each that cannot be read; a damaged one is removed."""
        packs, messages = [], []
        for path in sorted(self.folder.glob("*.pack")):
            name = f"image cache: {escape_unprintable(str(path))}"
            try:
                with path.open("rb") as file:
                    packs.append(Pack(str(path), read_index(file.fileno())))
            except FileNotFoundError:  # just evicted
                pass
            except DamagedPackError as error:
                with suppress(OSError):
                    path.unlink()
                messages.append(f"{name} is damaged and was removed: {error}")
            except OSError as error:
                messages.append(f"{name} cannot be read ({error.strerror})")
        return packs, messages

    def open_pack(self, pack: Pack) -> bool:
        """Map a pack, lock it while it is mapped, and note its use; return whether it could be opened."""
        try:
            with open(pack.path, "rb") as file:  # noqa: PTH123
                _lock(file.fileno(), fcntl.LOCK_SH)
                pack.map_file(file.fileno())
        except (OSError, ValueError):  # evicted
            return False
        with suppress(OSError):  # a folder of another user
            os.utime(pack.path)
        return True

    def create(self) -> "NewPackFile":
        """Create the file of a pack; it appears in the folder when it is published.

        The packs that were not used for the longest time make room for it, unless a process uses them or this object
        has created them.

        Raises:
            OSError: the folder cannot be written to, or has no room.

        """
        self.folder.mkdir(parents=True, exist_ok=True)
        packs = self._sizes()
        total = sum(size for _, size, _ in packs)
        limit = (shutil.disk_usage(self.folder).free + total) // 2
        if self._max_bytes is not None:
            limit = min(limit, self._max_bytes)
        capacity = max(PACK_BYTES, 2 * limit // MAX_PACKS)
        for count, (_, size, path) in enumerate(sorted(packs)):
            if total + capacity <= limit and len(packs) - count < MAX_PACKS:
                break
            with suppress(OSError):
                if path not in self._published and _remove_unlocked(path):
                    total -= size
        if limit - total < PACK_BYTES // 64:  # packs would be too small
            raise OSError(errno.ENOSPC, f"its limit of {limit / 1e9:.1f} GB is reached")
        return NewPackFile(self.folder, self._published, capacity=min(capacity, limit - total))

    def _sizes(self) -> list[tuple[int, int, Path]]:
        """Return (time of the last use [ns], size [bytes], path) of each pack."""
        packs = []
        for path in self.folder.glob("*.pack"):
            with suppress(FileNotFoundError):
                status = path.stat()
                packs.append((status.st_mtime_ns, status.st_size, path))
        return packs

    def remove_leftovers(self) -> None:
        """Remove the temporary files of writers that were killed."""
        for path in self.folder.glob(".*.tmp"):
            with suppress(OSError):
                _remove_unlocked(path)


class NewPackFile:
    """The temporary file of a pack, locked by this process."""

    def __init__(self, folder: Path, published: set[Path], *, capacity: int) -> None:
        """Create the file; `capacity` is the size at which it is complete [bytes]."""
        self.capacity, self._published = capacity, published
        self._path = folder / f".{secrets.token_hex(8)}.tmp"
        while True:
            self.file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            _lock(self.file, fcntl.LOCK_EX)
            if os.fstat(self.file).st_nlink:
                return
            os.close(self.file)  # another process took it for a leftover before it was locked

    def publish(self) -> None:
        """Move the complete pack into place.

        Raises:
            OSError: it could not be written; the file is removed.

        """
        try:
            os.close(self.file)  # reports a full disk on some network file systems
            path = self._path.with_name(f"{self._path.stem[1:]}.pack")
            self._published.add(path)  # first: another thread that makes room must not evict it
            self._path.rename(path)
        finally:
            self._path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Remove the file."""
        os.close(self.file)
        self._path.unlink(missing_ok=True)


def _remove_unlocked(path: Path) -> bool:
    """Remove a file unless a process has locked it; return whether it was removed."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)  # network file systems lock only files that are open for writing
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks
            if time.time() - os.fstat(file).st_mtime < _UNUSED_SECONDS:
                return False
        path.unlink()
        return True
    finally:
        os.close(file)


def _lock(file: int, kind: int) -> None:
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, kind)
