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
_STRIP_CELL = (80, 165)
"""Minimum and maximum width and height of an image of a strip, with its margin [pixels]."""
_STRIP_MARGIN = 4


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


def make_strip(samples: ClassSamples, width: int) -> Image.Image:
    """Return the images of a class, and below them the augmented ones, on a transparent background.

    Args:
        samples: the class. The strip has fewer of its images if they would be too small.
        width: maximum width [pixels].

    """
    smallest, largest = _STRIP_CELL
    columns = min(max(1, width // smallest), IMAGES_PER_CLASS)
    cell = min(width // columns, largest)
    strip = Image.new("RGBA", (min(columns, len(samples.originals)) * cell, 2 * cell))
    for row, images in enumerate((samples.originals, samples.augmented)):
        for column, image in enumerate(images[:columns]):
            scale = (cell - _STRIP_MARGIN) / max(image.size)
            fitted = image.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))))
            left, top = ((cell - size) // 2 for size in fitted.size)
            strip.paste(fitted, (column * cell + left, row * cell + top))
    return strip


def _draw_images(strip: "SubFigure", row: ClassSamples) -> None:
    grid = strip.subplots(2, IMAGES_PER_CLASS, squeeze=False)
    for axes_row, images in zip(grid, (row.originals, row.augmented), strict=True):
        for axes, image in itertools.zip_longest(axes_row, images):
            axes.axis("off")
            if image is not None:
                axes.imshow(image)
