"""Preview the data: `regraft preview --config FILE [--output FILE]`.

Draws the first training images of every class, and the same images with the augmentation of epoch 1. Terminals that can
show pictures show them.
"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
from collections.abc import Sequence

from regraft.contract import available_cores, create_output_folder
from trainer.cli import exit_after, run_cli
from trainer.commands.class_samples import MAX_CLASSES, sample_classes
from trainer.config.build_data import dataset_summary
from trainer.config.parse import parse, split_command
from trainer.config.resolve import resolve
from trainer.data.prepare import prepare
from trainer.errors import UserError
from trainer.report.console import make_console
from trainer.report.image_grid import make_strip, write_image_grid
from trainer.report.progress import progress_hooks
from trainer.report.terminal_image import find_image_terminal


def preview(argv: Sequence[str]) -> Path:
    """Draw a preview, and return its path.

    Raises:
        UserError: an error of the config or the dataset, or an unreadable image.

    """
    parser = argparse.ArgumentParser(
        prog="regraft preview",
        usage="regraft preview [FOLDER] [--output FILE] [--config FILE]\n"
        "                       [--SECTION.KEY VALUE ...]",
        allow_abbrev=False,
        description="Draw training images of every class, and the same images augmented as the model sees them.",
        epilog="All other options are those of regraft train: --config FILE, --SECTION.KEY VALUE.",
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="PNG file to write (default: RUN_DIR/preview.png)")
    own, options = split_command(parser, argv)
    config = resolve(parse(options))
    output: Path = own.output or Path(config.run.dir) / "preview.png"
    prepared = prepare(
        config.data,
        workers=available_cores(),
        displays=progress_hooks(make_console(enabled=True)),
        check=config.data.on_unreadable == "skip",
    )
    samples = sample_classes(prepared.index, config)
    erasing = ", random erasing" if config.data.random_erasing else ""
    augmentation = f"{config.data.augment}{erasing}, {config.data.image_size} px"
    classes = len(prepared.index.classes)
    shown = f"the first {MAX_CLASSES} of {classes} classes" if classes > MAX_CLASSES else f"all {classes} classes"
    title = f"training images of {shown}; below each row, as seen in epoch 1 ({augmentation})"
    folders = {os.path.dirname(path) for path, _ in prepared.examples}  # noqa: PTH120 (faster than a Path for each)
    if output.parent.resolve() in {Path(folder).resolve() for folder in folders}:
        raise UserError(f"{output}: would be an image of the dataset; set --output or run.dir to another folder")
    try:
        create_output_folder(output.parent)
        write_image_grid(samples, output, title=title)
    except OSError as error:
        raise UserError(f"--output {output}: cannot be written ({error.strerror})") from None
    print(dataset_summary(prepared))
    terminal = find_image_terminal()
    if terminal is not None:
        print(title)
        for row in samples:
            print(row.caption)
            terminal.show(make_strip(row, terminal.width))
    print(f"{output}: {shown}")
    return output


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda _: preview(words), on_restart="The same command draws the images")


if __name__ == "__main__":
    exit_after(main)
