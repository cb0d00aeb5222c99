"""Draw sample images of every class, and the same images augmented, as a grid."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from trainer.report.figures import write_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure, SubFigure

IMAGES_PER_CLASS = 4
_INCHES = 1.5
"""Width and height of an image, with its margin."""
_TITLE_HEIGHT = 0.2
"""Height of the titles, in rows."""


@dataclass(frozen=True, kw_only=True)
class ClassSamples:
    """Some training images of a class."""

    caption: str
    """Name of the class and its number of images."""
    originals: Sequence[Image.Image]
    """At most `IMAGES_PER_CLASS` images."""
    augmented: Sequence[Image.Image]
    """The same images as the model sees them in the first epoch."""


def write_image_grid(samples: Sequence[ClassSamples], path: Path, *, titles: tuple[str, str]) -> None:
    """Write a PNG file with a row per class: its images on the left, the augmented ones on the right.

    Args:
        samples: the rows.
        path: file to write; its folder must exist.
        titles: titles of the left and of the right half.

    """

    def draw(figure: "Figure") -> None:
        heights = [_TITLE_HEIGHT, *[1.0] * len(samples)]
        header, *strips = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        for x, title in zip((0.005, 0.51), titles, strict=True):
            header.text(x, 0.5, title, va="center", fontsize=11, weight="bold")
        for strip, row in zip(strips, samples, strict=True):
            strip.suptitle(row.caption, x=0.005, ha="left", fontsize=9, parse_math=False)
            left, right = strip.subfigures(1, 2, squeeze=False)[0]
            _draw_images(left, row.originals)
            _draw_images(right, row.augmented)

    width = 2 * IMAGES_PER_CLASS * _INCHES
    write_figure(path, draw, size=(width, (len(samples) + _TITLE_HEIGHT) * (_INCHES + 0.2)), dpi=110)


def _draw_images(strip: "SubFigure", images: Sequence[Image.Image]) -> None:
    grid = strip.subplots(1, IMAGES_PER_CLASS, squeeze=False)[0]
    for axes, image in itertools.zip_longest(grid, images):
        axes.axis("off")
        if image is not None:
            axes.imshow(image)
