"""The command-line arguments that predict, evaluate and export share."""

import argparse


def positive_int(text: str) -> int:
    """Return a whole number of 1 or more, as the type of an argument."""
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return int(text)


def positive_int_or_auto(text: str) -> int | None:
    """Return a whole number of 1 or more, or None for `auto`, as the type of an argument."""
    return None if text == "auto" else positive_int(text)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the positional argument MODEL."""
    parser.add_argument("model", metavar="MODEL", help="run folder, or a model file (model.safetensors)")


def add_execution(parser: argparse.ArgumentParser, *, auto: str) -> None:
    """Add --batch-size and --device; `auto` says which batch size is chosen."""
    parser.add_argument(
        "--batch-size",
        type=positive_int_or_auto,
        metavar="N|auto",
        help=f"images in a forward pass; auto: {auto} (default: auto)",
    )
    parser.add_argument("--device", default="auto", metavar="NAME", help="auto, cpu or cuda (default: auto)")
