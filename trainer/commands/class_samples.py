"""Sample images of every class, original and augmented, for the preview."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
from PIL import Image

from trainer.config.build_loaders import make_train_transform
from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import ResizeShorter
from trainer.data.decode import UnreadableImage, decode
from trainer.data.index import DatasetIndex
from trainer.data.sampler import SampleKey
from trainer.errors import UserError
from trainer.report.image_grid import IMAGES_PER_CLASS, ClassSamples
from trainer.text import escape_unprintable

MAX_CLASSES = 24
"""A preview of more classes would be too long to look at."""


def sample_classes(index: DatasetIndex, config: ResolvedConfig) -> list[ClassSamples]:
    """Return the first training images of the first 24 classes, and the same images as epoch 1 trains on them.

    Raises:
        UserError: an image cannot be read.

    """
    positions: defaultdict[int, list[int]] = defaultdict(list)
    for position, (_, label) in enumerate(index.train):
        positions[label].append(position)
    return [
        _sample_class(index, label, positions[label], config) for label in range(min(len(index.classes), MAX_CLASSES))
    ]


def _sample_class(index: DatasetIndex, label: int, positions: Sequence[int], config: ResolvedConfig) -> ClassSamples:
    shown = positions[:IMAGES_PER_CLASS]
    originals = [_read_image(index.train[position].path) for position in shown]
    transform, size = make_train_transform(config.data), config.data.cache_resize
    inputs = originals
    if size is not None and config.data.has_random_transform:
        inputs = [ResizeShorter(size)(image) for image in originals]
    # The generators of epoch 1: the run trains on exactly these images.
    generators = [SampleKey(0, position).generator(config.run.seed) for position in shown]
    return ClassSamples(
        caption=f"{escape_unprintable(index.classes[label])} ({len(positions)})",
        originals=[Image.fromarray(image) for image in originals],
        augmented=[
            Image.fromarray(transform(image, generator)) for image, generator in zip(inputs, generators, strict=True)
        ],
    )


def _read_image(path: str) -> np.ndarray:
    try:
        return decode(path)
    except UnreadableImage as error:
        raise UserError(f"{escape_unprintable(path)}: this image cannot be read: {error}") from None
