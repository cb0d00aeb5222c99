"""Packs in memory: anonymous files, which the kernel frees when the last process that uses them ends."""

import os
from collections.abc import Set

from trainer.data.image_cache.pack import Pack, read_index


class PackMemory:
    """Packs in memory. Other processes of this user and machine open them by their paths in /proc."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}

    @property
    def paths(self) -> list[str]:
        """Return the paths of the packs, which exist as long as this process."""
        return [*self._files]

    @property
    def size(self) -> int:
        """Return the size of the packs [bytes]."""
        return sum(os.fstat(file).st_size for file in self._files.values())

    def create(self) -> "NewMemoryFile":
        """Create the file of a pack; it has a path when it is published."""
        return NewMemoryFile(self._files)

    def keep_only(self, paths: Set[str]) -> None:
        """Free the packs at other paths, as soon as no process uses them."""
        for path in self._files.keys() - paths:
            os.close(self._files.pop(path))


class NewMemoryFile:
    """An anonymous file in memory."""

    capacity = 2**32
    """Size at which the pack is complete [bytes]."""

    def __init__(self, files: dict[str, int]) -> None:
        self._files = files
        self.file = os.memfd_create("regraft-images", os.MFD_CLOEXEC)

    def publish(self) -> None:
        """Give the complete pack a path."""
        self._files[f"/proc/{os.getpid()}/fd/{self.file}"] = self.file

    def discard(self) -> None:
        """Free the file."""
        os.close(self.file)


def open_packs(paths: list[str]) -> list[Pack]:
    """Return the packs at paths of `PackMemory`, mapped.

    Raises:
        OSError: the process that created them has ended, or belongs to another user.

    """
    packs = []
    for path in paths:
        with open(path, "rb") as file:  # noqa: PTH123
            packs.append(Pack(path, read_index(file.fileno())))
            packs[-1].map_file(file.fileno())
    return packs
