"""Compare most files of a large dataset with their validation results when they are first read, not at the start.

The system needs 2 microseconds for the times of a file on a local disk, and far more on a network: for a million files,
this would be most of the start. The start of a large dataset compares

- all files if the times of a folder have changed, as they do when a file in it is added, removed, renamed, or replaced
  by another file (by editors, rsync and git, for example);
- else every k-th file, and all if one of these has changed. A program that has rewritten many files is noticed here;
- always all images that could not be read.

A single file whose content was overwritten in place, which does not change its folder, is noticed when it is first
read, from the image cache too. The times of folders only decide when a file is compared, so nothing is lost if they are
coarse, or cached by a network file system. Whether a file has changed is decided by its own size and times. As in a
small dataset, a new content of equal size within one tick of the file system's clock cannot be noticed.
"""

import hashlib
import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from trainer.data.file_versions import read_versions
from trainer.run.atomic import write_text_atomically

MAX_COMPARED = 50_000
"""Most images whose files are all compared at every start."""


class FolderTimes:
    """A record of the times that the folders of a large dataset had when all of its files were last compared.

    It is valid for these images alone: a CSV may name others of the same folders.
    """

    def __init__(self, file: Path, folders: Iterable[str], images: str, *, count: int) -> None:
        """Read the times that the folders have now, if there are many images.

        Args:
            file: the record.
            folders: paths of the folders.
            images: names of the images.
            count: their number.

        """
        self.file, self._now = file, ""
        if count > MAX_COMPARED:
            names = sorted(folders)
            content = hashlib.sha256(read_versions(names).tobytes())
            for part in (*names, images):
                content.update(os.fsencode(f"{part}\0"))
            self._now = content.hexdigest()

    def are_unchanged(self) -> bool:
        """Return whether no folder has changed since all files were compared."""
        try:
            return bool(self._now) and self.file.read_bytes() == self._now.encode()
        except OSError:
            return False

    def write(self) -> None:
        """Record that all files were compared after this object was created."""
        if self._now:
            with suppress(OSError):  # the next start compares all files
                write_text_atomically(self.file, self._now)


@dataclass(frozen=True)
class DeferredChecks:
    """What the files of images must be that were not compared at the start."""

    times_file: Path
    """Of `FolderTimes`."""
    is_deferred: np.ndarray
    """bool [N]: whether the file of each image is still to be compared."""
    versions: np.ndarray
    """int64 [N, 3]: the validated `FileVersion` of each."""
    digests: np.ndarray
    """uint64 [N]: the hash of the content of each."""

    def select(self, rows: np.ndarray | slice) -> "DeferredChecks":
        """Return the checks of some images, or of all in another order."""
        return DeferredChecks(self.times_file, self.is_deferred[rows], self.versions[rows], self.digests[rows])

    def compare_all_at_next_start(self) -> None:
        """Remove the record of the folders."""
        with suppress(OSError):  # the next start finds the same change
            self.times_file.unlink(missing_ok=True)


def read_some_versions(
    paths: Sequence[str], validated: np.ndarray, may_defer: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Return the `FileVersion` of each file, int64 [N, 3], and whether it is only expected, not read: bool [N].

    Args:
        paths: the files.
        validated: int64 [N, 3], the version of each that was validated; -1 if there is none.
        may_defer: bool [N], whether a file may be compared later.

    """
    is_deferred = may_defer & (validated[:, 0] >= 0)
    is_deferred[:: -(-len(paths) // MAX_COMPARED)] = False
    if is_deferred.any() and validated.min() >= 0:
        versions = validated.copy()
        rows = np.flatnonzero(~is_deferred)
        versions[rows] = read_versions(paths[row] for row in rows.tolist())
        if (versions == validated).all():
            return versions, is_deferred
    return read_versions(paths), np.zeros(len(paths), dtype=bool)
