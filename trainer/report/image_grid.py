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

IMAGES_PER_CLASS = 8
_INCHES = 1.5
"""Width and height of an image, with its margin."""
_TITLE_HEIGHT, _CAPTION_HEIGHT = 0.2, 0.15
"""Height of the title, and of the caption of a class, in rows."""


@dataclass(frozen=True, kw_only=True)
class ClassSamples:
    """Some training images of a class."""

    caption: str
    """Name of the class and its number of images."""
    originals: Sequence[Image.Image]
    """At most `IMAGES_PER_CLASS` images."""
    augmented: Sequence[Image.Image]
    """The same images as the model sees them in the first epoch."""


def write_image_grid(samples: Sequence[ClassSamples], path: Path, *, title: str) -> None:
    """Write a PNG file with two rows per class: its images, and below them the augmented ones.

    Args:
        samples: the classes.
        path: file to write; its folder must exist.
        title: title of the picture.

    """

    def draw(figure: "Figure") -> None:
        heights = [_TITLE_HEIGHT, *[_CAPTION_HEIGHT + 2.0] * len(samples)]
        header, *strips = figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
        header.text(0.005, 0.5, title, va="center", fontsize=11, weight="bold")
        for strip, row in zip(strips, samples, strict=True):
            strip.suptitle(row.caption, x=0.005, ha="left", fontsize=9, parse_math=False)
            _draw_images(strip, row)

    height = _TITLE_HEIGHT + len(samples) * (_CAPTION_HEIGHT + 2.0)
    write_figure(path, draw, size=(IMAGES_PER_CLASS * _INCHES, height * _INCHES), dpi=110)


def _draw_images(strip: "SubFigure", row: ClassSamples) -> None:
    grid = strip.subplots(2, IMAGES_PER_CLASS, squeeze=False)
    for axes_row, images in zip(grid, (row.originals, row.augmented), strict=True):
        for axes, image in itertools.zip_longest(axes_row, images):
            axes.axis("off")
            if image is not None:
                axes.imshow(image)
