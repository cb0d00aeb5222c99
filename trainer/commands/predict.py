"""Predict images with a trained model: `regraft predict MODEL PATHS...`.

Prints a CSV, or writes a CSV, JSON Lines or Parquet. After a stop, the same command goes on from the last image.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Before all other imports: see regraft/search_path.py.
    sys.path[: 0 if sys.flags.safe_path else 1] = [str(Path(__file__).resolve().parents[2])]
    from regraft.search_path import protect_imports

    protect_imports()

import argparse
from collections.abc import Sequence

from trainer.cli import exit_after, run_cli
from trainer.commands.model_arguments import add_execution, add_model, positive_int, positive_int_or_auto
from trainer.distributed.signals import StopSignals

SAVED = "saved"
"""Value of --threshold: the threshold in the header of the model file."""


def predict(argv: Sequence[str], signals: StopSignals) -> None:
    """Predict images, and print or write the results; see `predict_images`."""
    arguments = parser().parse_args(argv)
    # torch takes seconds to import: a wrong option is reported without it. Signals are deferred, since an interrupted
    # import would leave half a module behind.
    with signals.deferred():
        from trainer.commands.predict_images import predict_images  # noqa: PLC0415
    signals.raise_if_received()
    predict_images(arguments, signals)


def _threshold(text: str) -> float | str:
    if text == SAVED:
        return text
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}: expected a probability from 0 to 1, or {SAVED}")
    return value


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    own = argparse.ArgumentParser(
        prog="regraft predict",
        allow_abbrev=False,
        description="Predict the classes of images with a trained model. Without --output, a CSV is printed. Images "
        "that cannot be read are listed. After a stop, the same command with --output goes on from the last image.",
        epilog="Exit codes: 0: all images have a row; 2: an error that can be fixed, or no image can be read; "
        "75: stopped by a signal.",
    )
    add = own.add_argument
    add_model(own)
    add(
        "paths",
        metavar="PATH",
        nargs="+",
        help="image, folder (with its subfolders), pattern such as 'photos/*.jpg', .csv with a column of paths, or - "
        "for a list on standard input",
    )
    add("--output", type=Path, metavar="FILE", help="file to write: .csv, .jsonl or .parquet; never overwritten")
    add("--topk", type=positive_int, default=1, metavar="K", help="number of classes per image (default: 1)")
    add(
        "--threshold",
        type=_threshold,
        metavar="P",
        help=f"probability below which the answer is `unknown`; {SAVED}: the threshold in the model file",
    )
    add("--calibrated", action="store_true", help="calibrate probabilities by the temperature in the model file")
    add("--tta", action="store_true", help="average the logits of each image and of its mirror image")
    add("--sort-into", type=Path, metavar="DIR", help="copy the images into a folder per class; nothing is overwritten")
    add(
        "--sort-mode",
        choices=("copy", "symlink", "hardlink"),
        default="copy",
        help="how --sort-into creates the files (default: copy)",
    )
    add("--column", metavar="NAME", help="column of the paths in a .csv (default: recognized, such as `path`)")
    add(
        "--nproc",
        type=positive_int_or_auto,
        metavar="N|auto",
        help="number of processes; auto: one per GPU, or one (default: auto)",
    )
    add_execution(own, auto="8 on a CPU, on a GPU 128 or as many as its memory takes")
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(
        lambda signals: predict(words, signals), on_restart="With --output, the same command goes on after these images"
    )


if __name__ == "__main__":
    exit_after(main)
