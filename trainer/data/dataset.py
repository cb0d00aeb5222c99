"""`ImageDataset`: decoded and transformed images, each with randomness of its own."""

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
"""Image uint8 [H, W, 3], label, and the example's position in the list of examples."""


class ImageReadError(UserError):
    """An image that cannot be read now, although it could be when it was checked.

    DataLoader raises a worker's exception again in the main process, with its type and the text of the worker's
    traceback. Only the end of that text is the message.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text.rpartition(f"{type(self).__name__}: ")[2].rstrip("\n"))


class ImageDataset(Dataset[Item]):
    """The images of a split. Reading them is all that a worker process does."""

    def __init__(
        self, examples: Sequence[tuple[str, int]], transform: Transform, *, seed: int, threads: int = 1
    ) -> None:
        """Take the examples of a split.

        Args:
            examples: (path, label) pairs.
            transform: RGB image -> RGB image of the model's size.
            seed: the run's seed.
            threads: number of images that are decoded at once, where there are no worker processes.

        """
        self.paths = [path for path, _ in examples]
        self.labels = np.array([label for _, label in examples], dtype=np.int64)
        self.transform = transform
        self.seed = seed
        self.threads = threads

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, key: SampleKey) -> Item:
        """Return the image, its label and its position; raises ImageReadError."""
        return self._transform(key, self._decode(key))

    def __getitems__(self, keys: Sequence[SampleKey]) -> list[Item]:
        """Return a local batch: torch's loader asks for all of it at once.

        Pillow releases the GIL while it decodes. The transforms use the process's one generator, so they run one
        after the other. At most `threads` decoded images are held at once, since some are large.
        """
        if self.threads == 1:
            return [self[key] for key in keys]
        items: list[Item] = []
        with ThreadPoolExecutor(self.threads) as pool:
            for start in range(0, len(keys), self.threads):
                some = keys[start : start + self.threads]
                items += map(self._transform, some, pool.map(self._decode, some))
        return items

    def _decode(self, key: SampleKey) -> Image.Image:
        path = self.paths[key.example]
        try:
            return decode(path)
        except UnreadableImage as error:
            raise ImageReadError(
                f"{escape_unprintable(path)}: this image cannot be read: {error}. If it could be when training began, "
                "it has changed since: restore it, and the same command resumes from the last checkpoint"
            ) from None

    def _transform(self, key: SampleKey, image: Image.Image) -> Item:
        numbers = (key.epoch, key.example, key.repeat) if key.repeat else (key.epoch, key.example)
        image = apply_seeded(self.transform, image, derive_seed("crop", self.seed, *numbers))
        return to_array(image), int(self.labels[key.example]), key.example
