"""Look at the data: `python -m trainer.commands.preview --config F [--output FILE]`.

Draws the note's 2 x 8 grid (the first 8 training pictures of the first class over the last 8 of the last),
and below it the same pictures augmented, as the model will see them.
"""

import argparse
import itertools
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:
    # Run by path, as main.py may be too.
    sys.path[0] = str(Path(__file__).resolve().parents[2])

from matplotlib.figure import Figure
from PIL import Image

from regraft.contract import available_cores
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


def chosen(index: DatasetIndex) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """Return the first 8 training examples of the first class, and the last 8 of the last."""
    first = tuple(example for example in index.train if example.label == 0)
    last = tuple(example for example in index.train if example.label == len(index.classes) - 1)
    return first[:COLUMNS], last[-COLUMNS:]


def _picture(path: str) -> Image.Image:
    try:
        return decode(path)
    except UnreadableImage as error:
        raise UserError(f"{escape_unprintable(path)}: this image cannot be read: {error}") from None


def draw(rows: Sequence[tuple[str, Sequence[Image.Image]]], path: Path) -> None:
    """Write rows of up to 8 pictures, each under its caption, to one PNG."""
    figure = Figure(figsize=(1.45 * COLUMNS, 1.7 * len(rows)), layout="constrained")
    strips = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for strip, (caption, pictures) in zip(strips, rows, strict=True):
        strip.suptitle(caption, x=0.005, ha="left", fontsize=9, fontfamily=fonts(), parse_math=False)
        grid = strip.subplots(1, COLUMNS, squeeze=False)[0]
        for axes, picture in itertools.zip_longest(grid, pictures):
            axes.axis("off")
            if picture is not None:
                axes.imshow(picture)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, path, dpi=120)


def preview(argv: Sequence[str]) -> Path:
    """Draw the preview that the command line asks for, and return its path.

    Raises:
        UserError: as a run of the same config would, or a picture that cannot be read.

    """
    parser = argparse.ArgumentParser(
        prog="python -m trainer.commands.preview",
        description="Draw the data, and the same pictures augmented as the model will see them, to one PNG.",
        epilog="All other options are those of trainer/main.py: --config FILE, --section.key VALUE.",
    )
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="the PNG to write (default: RUN.DIR/preview.png)"
    )
    own, rest = parser.parse_known_args(argv)
    config = resolve(parse(rest))
    output: Path = own.output or Path(config.run.dir) / "preview.png"

    prepared = prepare(
        config.data,
        workers=available_cores(),
        displays=progress_hooks(make_console(speaks=True)),
        check=config.data.on_unreadable == "skip",
    )
    index, preprocessing = prepared.index, config.data.preprocessing
    transform = make_train_transform(config.data)
    augmented_by = config.data.augment + (", random erasing" if config.data.random_erasing else "")
    places = {example: number for number, example in enumerate(index.train)}
    seen: list[tuple[str, list[Image.Image]]] = []
    augmented: list[tuple[str, list[Image.Image]]] = []
    for examples in chosen(index):
        pictures = [_picture(example.path) for example in examples]
        name = index.classes[examples[0].label]
        # Epoch 0 of this run: exactly what it will train on first.
        seeds = [derive_seed("crop", config.run.seed, 0, places[example]) for example in examples]
        seen.append((name, pictures))
        augmented.append(
            (
                f"{name}, as seen in epoch 1 ({augmented_by}, {preprocessing.image_size} px)",
                [
                    apply_seeded(transform, picture, seed)
                    for picture, seed in zip(pictures, seeds, strict=True)
                ],
            )
        )
    try:
        draw([*seen, *augmented], output)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(dataset_summary(prepared))
    print(output)
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code."""
    try:
        preview(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
