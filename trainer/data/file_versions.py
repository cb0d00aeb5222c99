"""Size and times of files, which tell whether their content may have changed."""

# Creating a Path for each of a million files would take longer than reading its state.
# ruff: noqa: PTH116

import os
from array import array
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

_INT64_MAX = 2**63 - 1
MISSING_VERSION = (-1, -1, -1)
"""Row of a file that cannot be reached."""


class FileVersion(NamedTuple):
    """What the file system says about the content of a file."""

    size: int
    """Size of the file [bytes]."""
    mtime_ns: int
    """Time of the last modification [ns], which `touch`, `cp -p` and `rsync -t` set to any value."""
    ctime_ns: int
    """Time of the last change of the file or its metadata [ns], which only the file system sets."""


def read_versions(paths: Iterable[str]) -> np.ndarray:
    """Return the `FileVersion` of each file, int64 [N, 3]; -1 for a file that cannot be reached."""
    numbers = array("q")
    for path in paths:
        try:
            status = os.stat(path)
        except OSError:
            numbers.extend(MISSING_VERSION)
        else:  # a time may be in a year that 64 bits do not hold
            times = (status.st_mtime_ns & _INT64_MAX, status.st_ctime_ns & _INT64_MAX)
            numbers.extend((status.st_size, *times))
    return np.frombuffer(numbers, dtype=np.int64).reshape(-1, 3)
