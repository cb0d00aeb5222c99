"""Evaluate a trained model on labeled images: `regraft evaluate MODEL [DATA]`.

Prints the metrics, and writes them with pictures and the prediction of each image.
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
from trainer.commands.model_arguments import add_execution, add_model
from trainer.config.parse import parse
from trainer.distributed.signals import StopSignals
from trainer.errors import UserError

_DATA = "--data."
_DATA_OPTIONS = ("csv_columns", "csv_root", "csv_suffix", "extensions", "cache")
"""Options of section data that apply; images are preprocessed as the header of the model file says."""


def evaluate(argv: Sequence[str], signals: StopSignals) -> None:
    """Evaluate a model; see `evaluate_model`.

    Raises:
        UserError: something that the user can fix.

    """
    own, data_options = _split_options(argv)
    arguments = parser().parse_args(own)
    if arguments.store and not (arguments.calibrate or arguments.unknown):
        raise UserError("--store writes the result of --calibrate or --unknown into the model file: give one of them")
    data = parse([f"{_DATA}root=.", *data_options]).data
    # torch takes seconds to import: a wrong option is reported without it. Signals are deferred, since an interrupted
    # import would leave half a module behind.
    with signals.deferred():
        from trainer.commands.evaluate_model import evaluate_model  # noqa: PLC0415
    signals.raise_if_received()
    evaluate_model(arguments, data)


def _split_options(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the command's own words, and the options of section data as `--data.KEY=VALUE`.

    Raises:
        UserError: an option of section data that does not apply.

    """
    own: list[str] = []
    data_options: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith(_DATA):
            own.append(word)
            continue
        option = word if "=" in word else f"{word}={next(words, '')}"
        key = option.removeprefix(_DATA).partition("=")[0]
        if key not in _DATA_OPTIONS:
            raise UserError(
                f"{_DATA}{key}: does not apply; expected {', '.join(_DATA_OPTIONS)}. Images are preprocessed as the "
                "header of the model file says"
            )
        data_options.append(option)
    return own, data_options


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    own = argparse.ArgumentParser(
        prog="regraft evaluate",
        usage="regraft evaluate MODEL [DATA] [options] [--data.KEY VALUE ...]",
        allow_abbrev=False,
        description="Evaluate a trained model on labeled images: accuracy, metrics of each class, confusion matrix, "
        "calibration. Writes evaluation.json, predictions.csv and pictures.",
        epilog="Options that describe DATA are those of regraft train: --data.csv_columns, csv_root, csv_suffix, "
        "extensions and cache. Exit codes: 0: done; 2: an error that can be fixed.",
    )
    add = own.add_argument
    add_model(own)
    add(
        "data",
        metavar="DATA",
        nargs="?",
        help="folder with one folder per class, dataset with splits, or CSV of path and label (default: the images "
        "that the run was evaluated on)",
    )
    add("--split", metavar="NAME", help="split of DATA: train, val or test (default: test, else val)")
    add(
        "--map",
        action="append",
        default=[],
        metavar="NAME=CLASS",
        help="count images of class NAME of DATA as CLASS of the model; NAME= leaves them out; may be repeated",
    )
    add("--output", type=Path, metavar="DIR", help="folder to write to (default: evaluation/ beside the model file)")
    add("--calibrate", action="store_true", help="fit the temperature of the probabilities to these images")
    add(
        "--unknown",
        type=Path,
        metavar="FOLDER",
        help="images of none of the classes: rate the scores that reject them, and suggest a threshold",
    )
    add("--store", action="store_true", help="store the temperature or the threshold in the header of the model file")
    add_execution(own, auto="as in the run on a CPU, on a GPU 128 or as many as its memory takes")
    return own


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command, and return the exit code."""
    words = sys.argv[1:] if argv is None else argv
    return run_cli(lambda signals: evaluate(words, signals), on_restart="The same command evaluates all images again")


if __name__ == "__main__":
    exit_after(main)
