"""Dataset of decoded and transformed images, each with its own randomness."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from torch import Tensor
from torch.utils.data import Dataset

from trainer.data.augment import Transform
from trainer.data.decode import UnreachableImage, UnreadableImage, decode, hash_file, open_image_file
from trainer.data.deferred_checks import DeferredChecks
from trainer.data.file_versions import read_versions
from trainer.data.index import Examples
from trainer.data.sampler import SampleKey
from trainer.errors import UserError
from trainer.text import escape_unprintable

ReadImage = Callable[[int], np.ndarray]
"""Example -> its upright RGB image, uint8 [H, W, 3], C-contiguous, possibly a read-only view of a memory map."""
Item = tuple[np.ndarray, int, int]
"""Image uint8 [H, W, 3], label, and index of the example."""


class Batch(NamedTuple):
    """Local batch: the part of a global batch on one process. B may be 0."""

    images: Tensor
    """uint8 [B, 3, H, W]; or features of frozen layers [B, ...], which are computed once."""
    labels: Tensor
    """int64 [B]."""
    examples: Tensor
    """int64 [B]: indices into the examples of the split."""


class ImageReadError(UserError):
    """An image that cannot be read during training.

    DataLoader re-raises the exception of a worker with the worker's traceback as its text. The message is the end of
    that text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


class FileReader:
    """Decodes image files."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._paths = paths

    def __call__(self, example: int) -> np.ndarray:
        """Return the decoded image of an example, uint8 [H, W, 3]; raises ImageReadError."""
        path = self._paths[example]
        try:
            return decode(path)
        except UnreadableImage as error:
            raise ImageReadError(
                f"{escape_unprintable(path)}: this image cannot be read: {error}. If it was readable before "
                "training, it has changed since: restore it, and the same command resumes from the last checkpoint"
            ) from None


class ComparingReader:
    """Compares the file of an image with its validation result before another reader first reads it."""

    def __init__(self, read: ReadImage, paths: Sequence[str], checks: DeferredChecks) -> None:
        self._read, self._paths, self._checks = read, paths, checks
        self._is_pending = checks.is_deferred.copy()

    def __call__(self, example: int) -> np.ndarray:
        """Return the image of an example, as the other reader; raises ImageReadError if its content has changed."""
        if self._is_pending[example]:
            self._compare(example)
            self._is_pending[example] = False
        return self._read(example)

    def _compare(self, example: int) -> None:
        path, checks = self._paths[example], self._checks
        (version,) = read_versions([path])
        if (version == checks.versions[example]).all():
            return
        try:
            with open_image_file(path) as file:
                is_equal = int(hash_file(file), 16) == checks.digests[example]  # touched or copied
        except UnreachableImage:  # gone since the start; it may be in the image cache
            return
        except UnreadableImage:
            is_equal = False
        if not is_equal:
            checks.compare_all_at_next_start()
            raise ImageReadError(
                f"{escape_unprintable(path)}: this image has another content than when it was validated. The next "
                "start compares all images with their validation results: start the same command again, if there is "
                "a checkpoint, with --data.on_changed continue"
            )


class ImageDataset(Dataset[Item]):
    """Images of a split, indexed by `SampleKey`."""

    def __init__(
        self,
        examples: Sequence[tuple[str, int]],
        transform: Transform,
        *,
        seed: int,
        threads: int = 1,
        reader: ReadImage | None = None,
    ) -> None:
        """Create the dataset.

        Args:
            examples: (path, label) pairs.
            transform: maps a decoded image to an image of the model's size.
            seed: seed of the run.
            threads: number of images that are read and transformed at once.
            reader: reads the image of an example; None decodes its file.

        """
        examples = Examples.of(examples)
        self.paths, self.labels = examples.paths, examples.labels
        self.transform = transform
        self.seed = seed
        self.threads = threads
        self.read = reader or FileReader(self.paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: SampleKey) -> Item:
        """Return the image, its label and its index; raises ImageReadError."""
        image = self.transform(self.read(key.example), key.generator(self.seed))
        return image, int(self.labels[key.example]), key.example

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Item]:
        """Return the items of a local batch; DataLoader calls this if it exists.

        Decoding and resizing release the GIL. Each thread has one decoded image in memory, since some are large.
        """
        if self.threads == 1:
            return [self[key] for key in keys]
        with ThreadPoolExecutor(self.threads) as pool:
            return list(pool.map(self.__getitem__, keys))
