"""Read the images of a run: from the cache, or from their files where they are not cached."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import chain

import numpy as np

from trainer.data.deferred_checks import DeferredChecks
from trainer.data.image_cache.store import MISSING, ImageStore

ReadImage = Callable[[int], np.ndarray]


class CachedReader:
    """Reads images from the cache."""

    def __init__(self, store: ImageStore, entries: np.ndarray, fallback: ReadImage) -> None:
        """Create a reader.

        Args:
            store: the cached images.
            entries: entry of each example in the store, or `MISSING`.
            fallback: reads the other examples.

        """
        self._store, self._entries, self._fallback = store, entries.copy(), fallback

    def __call__(self, example: int) -> np.ndarray:
        """Return an image, uint8 [H, W, 3], which may be a read-only view."""
        entry = int(self._entries[example])
        if entry != MISSING:
            image = self._store.read(entry)
            if image is not None:
                return image
            self._entries[example] = MISSING
        return self._fallback(example)


class TransformedReader:
    """Applies a deterministic transform to what another reader returns."""

    def __init__(self, read: ReadImage, transform: Callable[[np.ndarray], np.ndarray]) -> None:
        self._read, self._transform = read, transform

    def __call__(self, example: int) -> np.ndarray:
        """Return the transform's output, uint8 [S, S, 3]."""
        return self._transform(self._read(example))


@dataclass(frozen=True)
class CachedImages:
    """The cached images of a run. By default there are none."""

    store: ImageStore = field(default_factory=ImageStore)
    paths: Sequence[Sequence[str]] = ()
    """Paths of the examples of each split."""
    originals: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Entry of the decoded (and resized) image of each example of all splits in the store, or `MISSING`."""
    outputs: np.ndarray = field(default_factory=lambda: np.empty(0, np.int64))
    """Entry of the output of the evaluation transform of each example of all splits, or `MISSING`."""
    deferred: DeferredChecks | None = None
    """Checks of the files that were not compared with their validation results at the start."""

    def reader(self, paths: Sequence[str], fallback: ReadImage) -> ReadImage:
        """Return a reader of images before a random transform.

        Args:
            paths: the images of a data set, which are examples of the run.
            fallback: reads an image that is not cached.

        """
        return self._cached_reader(self.originals, paths, fallback)

    def output_reader(
        self, paths: Sequence[str], originals: ReadImage, transform: Callable[[np.ndarray], np.ndarray]
    ) -> ReadImage:
        """Return a reader of the evaluation transform's outputs; `originals` reads decoded images."""
        return self._cached_reader(self.outputs, paths, TransformedReader(originals, transform))

    def deferred_checks(self, paths: Sequence[str]) -> DeferredChecks | None:
        """Return the checks of images that are examples of the run; None if their files were compared."""
        return None if self.deferred is None else self.deferred.select(self._rows(paths))

    def _cached_reader(self, entries: np.ndarray, paths: Sequence[str], fallback: ReadImage) -> ReadImage:
        return CachedReader(self.store, entries[self._rows(paths)], fallback) if len(entries) else fallback

    def _rows(self, paths: Sequence[str]) -> np.ndarray | slice:
        """Return the position of each image among the examples of all splits."""
        start = 0
        for of_split in self.paths:
            if of_split == paths:
                return slice(start, start + len(paths))
            start += len(of_split)
        positions = {path: position for position, path in enumerate(chain.from_iterable(self.paths))}
        return np.array([positions[path] for path in paths], dtype=np.int64)


NOT_CACHED = CachedImages()


def unchanged(image: np.ndarray, generator: object) -> np.ndarray:
    """Return the image: the transform of a reader's outputs."""
    return image
