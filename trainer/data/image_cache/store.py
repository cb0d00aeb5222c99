"""The images of several packs: find them by content, read them, and replace damaged packs."""

import hashlib
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from trainer.data.image_cache.pack import Pack, image_sizes
from trainer.text import escape_unprintable

MISSING = -1
"""Entry of an image that is not cached."""
_BITS = 32  # of an entry for the position in the pack; the bits above are the number of the pack


class ImageStore:
    """The images of several packs."""

    def __init__(self, packs: Iterable[Pack] = ()) -> None:
        self.packs = list(packs)
        self._has_warned = False

    def locate(self, digests: np.ndarray, variant: int) -> np.ndarray:
        """Return the entry of each image, int64, or `MISSING`.

        Args:
            digests: hashes of the contents of the image files, uint64.
            variant: what was done to the images, see `variant`.

        """
        known, entries = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
        for number, pack in enumerate(self.packs):
            (positions,) = np.nonzero(pack.records["variant"] == variant)
            known.append(pack.records["digest"][positions])
            entries.append(number << _BITS | positions)
        all_known, first = np.unique(np.concatenate(known), return_index=True)
        if not len(all_known):
            return np.full(len(digests), MISSING, np.int64)
        found = np.minimum(np.searchsorted(all_known, digests), len(all_known) - 1)
        return np.where(all_known[found] == digests, np.concatenate(entries)[first[found]], MISSING)

    def digests(self, variant: int) -> frozenset[int]:
        """Return the hashes of the contents of all images of a variant."""
        return frozenset(
            digest
            for pack in self.packs
            for digest in pack.records["digest"][pack.records["variant"] == variant].tolist()
        )

    def sizes(self, entries: np.ndarray) -> np.ndarray:
        """Return the size of each image [bytes], int64; 0 for `MISSING`."""
        sizes = np.zeros(len(entries), np.int64)
        numbers = entries >> _BITS
        for number in np.unique(numbers[entries != MISSING]):
            of_pack = numbers == number
            sizes[of_pack] = image_sizes(self.packs[number].records[entries[of_pack] & (1 << _BITS) - 1])
        return sizes

    def packs_of(self, entries: np.ndarray) -> list[Pack]:
        """Return the packs that contain the images."""
        return [self.packs[number] for number in np.unique(entries[entries != MISSING] >> _BITS)]

    def read(self, entry: int) -> np.ndarray | None:
        """Return an image, a read-only view uint8 [H, W, 3]; None if it cannot be read or is damaged.

        The pack of a damaged image is removed, so that the next start caches its images again.
        """
        pack = self.packs[entry >> _BITS]
        try:
            image = pack.read(entry & (1 << _BITS) - 1)
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


def parse_digests(digests: Sequence[str]) -> np.ndarray:
    """Return hashes of 16 hexadecimal digits as uint64."""
    return np.frombuffer(bytes.fromhex("".join(digests)), ">u8").astype(np.uint64)
