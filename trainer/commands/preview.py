"""Preview the data: `python -m trainer.commands.preview --config FILE [--output FILE]`.

Draws the first 8 training images of the first class and the last 8 of the last class, as the D2L recipe does, and the
same images with the augmentation of epoch 1.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Run by path: see main.py.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from matplotlib.figure import Figure
from PIL import Image

from regraft.contract import available_cores, create_output_folder
from trainer.config.build_data import dataset_summary
from trainer.config.build_loaders import make_train_transform
from trainer.config.parse import parse
from trainer.config.resolve import resolve
from trainer.data.augment import apply_seeded
from trainer.data.decode import UnreadableImage, decode
from trainer.data.index import DatasetIndex, Example
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.report.console import make_console
from trainer.report.figures import fonts, save_figure
from trainer.report.progress import progress_hooks
from trainer.seeds import derive_seed
from trainer.text import escape_unprintable

COLUMNS = 8


def first_and_last(index: DatasetIndex) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the first 8 training examples of the first class, and the last 8 of the last class."""
    first = tuple(example for example in index.train if example.label == 0)
    last = tuple(example for example in index.train if example.label == len(index.classes) - 1)
    return first[:COLUMNS], last[-COLUMNS:]


def _read_image(path: str) -> Image.Image:
    try:
        return decode(path)
    except UnreadableImage as error:
        raise UserError(f"{escape_unprintable(path)}: this image cannot be read: {error}") from None


def draw(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write rows of up to 8 images, each row under its caption, to a PNG file."""
    figure = Figure(figsize=(1.45 * COLUMNS, 1.7 * len(rows)), layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for strip, (caption, images) in zip(strips, rows, strict=True):
        strip.suptitle(caption, x=0.005, ha="left", fontsize=9, fontfamily=fonts(), parse_math=False)
        grid = strip.subplots(1, COLUMNS, squeeze=False)[0]
        for axes, image in itertools.zip_longest(grid, images):
            axes.axis("off")
            if image is not None:
                axes.imshow(image)
    create_output_folder(path.parent)
    save_figure(figure, path, dpi=120)


def preview(argv: Sequence[str]) -> Path:
    """Draw a preview, and return its path.

    Raises:
        UserError: an error of the config or the dataset, or an unreadable image.

    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.commands.preview",
        description="Draw training images, and the same images augmented as the model sees them, to a PNG file.",
        epilog="All other options are those of regraft train: --config FILE, --section.key VALUE.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG file to write (default: RUN_DIR/preview.png)")
    own, rest = parser.parse_known_args(argv)
    config = resolve(parse(rest))
    output: Path = own.output or Path(config.run.dir) / "preview.png"

    prepared = prepare(
        config.data,
        workers=available_cores(),
        displays=progress_hooks(make_console(enabled=True)),
        check=config.data.on_unreadable == "skip",
    )
    index, preprocessing = prepared.index, config.data.preprocessing
    transform = make_train_transform(config.data)
    augmentation = config.data.augment + (", random erasing" if config.data.random_erasing else "")
    positions = {example: number for number, example in enumerate(index.train)}
    originals: list[tuple[str, list[Image.Image]]] = []
    augmented: list[tuple[str, list[Image.Image]]] = []
    for examples in first_and_last(index):
        images = [_read_image(example.path) for example in examples]
        name = index.classes[examples[0].label]
        # The seeds of epoch 1: the run trains on exactly these images.
        seeds = [derive_seed("crop", config.run.seed, 0, positions[example]) for example in examples]
        originals.append((name, images))
        augmented.append(
            (
                f"{name}, as seen in epoch 1 ({augmentation}, {preprocessing.image_size} px)",
                [apply_seeded(transform, image, seed) for image, seed in zip(images, seeds, strict=True)],
            )
        )
    try:
        draw([*originals, *augmented], output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(dataset_summary(prepared))
    print(output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    try:
        preview(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
