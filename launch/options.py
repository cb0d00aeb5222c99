"""Split a command line between the launcher and the trainer, and parse its numbers."""

from argparse import ArgumentTypeError
from collections.abc import Sequence


def split_options(argv: Sequence[str], own: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split a command line into the launcher's arguments and the trainer's.

    Args:
        argv: the whole command line.
        own: options of the launcher that take a value, given as `--name value` or `--name=value`.

    """
    launcher: list[str] = []
    trainer: list[str] = []
    remaining = list(argv)
    while remaining:
        word = remaining.pop(0)
        name, equals, _ = word.partition("=")
        if name in own:
            launcher.append(word)
            if not equals and remaining:
                launcher.append(remaining.pop(0))
        else:
            trainer.append(word)
    return launcher, trainer


def option_name(field: str) -> str:
    """Return the command-line option of a field: `--max-restarts` for `max_restarts`."""
    return f"--{field.replace('_', '-')}"


def nonnegative_int(text: str) -> int:
    """Parse a whole number of 0 or more, for argparse."""
    if not (text.isascii() and text.isdigit()):
        raise ArgumentTypeError(f"{text!r}: expected a whole number, 0 or more")
    return int(text)


def positive_int(text: str) -> int:
    """Parse a whole number of 1 or more, for argparse."""
    number = nonnegative_int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise ArgumentTypeError(f"{text!r}: expected a whole number, 1 or more")
    return number


def process_count(text: str) -> int | None:
    """Parse the number of processes, for argparse; `auto` is None."""
    return None if text == "auto" else positive_int(text)
