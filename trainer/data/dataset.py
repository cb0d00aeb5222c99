"""Dataset of decoded and transformed images, each with its own randomness."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from torch.utils.data import Dataset

from trainer.data.augment import Transform, apply_seeded, to_array
from trainer.data.decode import UnreadableImage, decode
from trainer.data.sampler import SampleKey
from trainer.errors import UserError
from trainer.seeds import derive_seed
from trainer.text import escape_unprintable

Item = tuple[np.ndarray, int, int]
"""Image uint8 [H, W, 3], label, and index of the example."""


class ImageReadError(UserError):
    """An image that cannot be read during training.

    DataLoader re-raises the exception of a worker with the worker's traceback as its text. The message is the end of
    that text.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


class ImageDataset(Dataset[Item]):
    """Images of a split, indexed by `SampleKey`."""

    def __init__(
        self, examples: Sequence[tuple[str, int]], transform: Transform, *, seed: int, threads: int = 1
    ) -> None:
        """Create the dataset.

        Args:
            examples: (path, label) pairs.
            transform: maps an RGB image to an RGB image of the model's size.
            seed: seed of the run.
            threads: number of images that are decoded at once.

        """
        self.paths = [path for path, _ in examples]
        self.labels = np.array([label for _, label in examples], dtype=np.int64)
        self.transform = transform
        self.seed = seed
        self.threads = threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: SampleKey) -> Item:
        """Return the image, its label and its index; raises ImageReadError."""
        return self._transform(key, self._decode(key))

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Item]:
        """Return the items of a local batch; DataLoader calls this if it exists.

        Pillow releases the GIL while it decodes. Transforms run one after the other, since they share PyTorch's
        generator. At most `threads` decoded images are in memory at once, since some are large.
        """
        if self.threads == 1:
            return [self[key] for key in keys]
        items: list[Item] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(keys), self.threads):
                chunk = keys[start : start + self.threads]
                items += map(self._transform, chunk, pool.map(self._decode, chunk))
        return items

    def _decode(self, key: SampleKey) -> Image.Image:
        path = self.paths[key.example]
        try:
            return decode(path)
        except UnreadableImage as error:
            raise ImageReadError(
                f"{escape_unprintable(path)}: this image cannot be read: {error}. If it was readable before "
                "training, it has changed since: restore it, and the same command resumes from the last checkpoint"
            ) from None

    def _transform(self, key: SampleKey, image: Image.Image) -> Item:
        numbers = (key.epoch, key.example, key.repeat) if key.repeat else (key.epoch, key.example)
        image = apply_seeded(self.transform, image, derive_seed("crop", self.seed, *numbers))
        return to_array(image), int(self.labels[key.example]), key.example
