"""The images of several packs: find them by content, read them, and replace damaged packs."""

import hashlib
import sys
from bisect import bisect_right
from collections.abc import Iterable
from contextlib import suppress
from itertools import accumulate
from pathlib import Path

import numpy as np

from trainer.data.image_cache.pack import RECORD, Pack, image_sizes
from trainer.text import escape_unprintable

MISSING = -1
"""Entry of an image that is not cached."""


class ImageStore:
    """The images of several packs. The entry of an image is its position in the order of the packs."""

    def __init__(self, packs: Iterable[Pack] = ()) -> None:
        self.packs = list(packs)
        self._starts = [0, *accumulate(len(pack.records) for pack in self.packs)]
        self._indices: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._has_warned = False

    def locate(self, digests: np.ndarray, variant: int) -> np.ndarray:
        """Return the entry of each image, int64, or `MISSING`.

        Args:
            digests: hashes of the contents of the image files, uint64.
            variant: what was done to the images, see `variant`.

        """
        known, entries = self._index(variant)
        if not len(known):
            return np.full(len(digests), MISSING, np.int64)
        order = np.argsort(digests)  # in this order, the search is several times faster
        found = np.empty(len(digests), np.int64)
        found[order] = np.searchsorted(known, digests[order]).clip(max=len(known) - 1)
        return np.where(known[found] == digests, entries[found], MISSING)

    def digests(self, variant: int) -> frozenset[int]:
        """Return the hashes of the contents of all images of a variant."""
        return frozenset(self._index(variant)[0].tolist())

    def _index(self, variant: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the sorted digests of a variant, and their entries."""
        if variant not in self._indices:
            records = np.concatenate([np.empty(0, RECORD), *(pack.records for pack in self.packs)])
            (entries,) = np.nonzero(records["variant"] == variant)
            digests = records["digest"][entries]
            order = np.argsort(digests)
            self._indices[variant] = digests[order], entries[order]
        return self._indices[variant]

    def sizes(self, entries: np.ndarray) -> np.ndarray:
        """Return the size of each image [bytes], int64; 0 for `MISSING`."""
        sizes: np.ndarray = self._sizes()[entries]
        return sizes

    def total_size(self, entries: np.ndarray) -> int:
        """Return the size of the images [bytes]; repeated entries count once."""
        is_used = np.zeros(self._starts[-1] + 1, bool)
        is_used[entries] = True
        return int(self._sizes()[is_used].sum())

    def packs_of(self, entries: np.ndarray) -> list[Pack]:
        """Return the packs that contain the images."""
        is_used = np.zeros(self._starts[-1] + 1, bool)
        is_used[entries] = True
        return [
            pack
            for pack, start, end in zip(self.packs, self._starts, self._starts[1:], strict=False)
            if is_used[start:end].any()
        ]

    def _sizes(self) -> np.ndarray:
        """Return the sizes of all images, and 0 at the end for `MISSING`, which is -1."""
        return np.concatenate([*(image_sizes(pack.records) for pack in self.packs), np.zeros(1, np.int64)])

    def read(self, entry: int) -> np.ndarray | None:
        """Return an image, a read-only view uint8 [H, W, 3]; None if it cannot be read or is damaged.

        The pack of a damaged image is removed, so that the next start caches its images again.
        """
        number = bisect_right(self._starts, entry) - 1
        pack = self.packs[number]
        try:
            image = pack.read(entry - self._starts[number])
        except (OSError, ValueError) as error:  # removed before this process has opened it
            self._warn(f"cannot be read ({getattr(error, 'strerror', None) or error})")
            return None
        if image is None:
            with suppress(OSError):
                Path(pack.path).unlink()
            self._warn(f"{escape_unprintable(pack.path)} is damaged and was removed")
        return image

    def _warn(self, problem: str) -> None:
        """Print the first problem of this process. A worker process has no other way to report it."""
        if not self._has_warned:
            self._has_warned = True
            text = f"image cache: {problem}; its images are decoded from their files"
            print(text, file=sys.stderr, flush=True)


def variant(*parts: object) -> int:
    """Return a hash of what was done to images: the version of the decoder, and a transform if there is one."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "little")
