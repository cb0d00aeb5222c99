"""The trainer's command line, as far as the launcher reads it too: `--option value`, and the folder of a dataset."""

from collections.abc import Sequence

_FLAGS = ("--debug", "--print_config", "--help")
"""Options that stand alone; `--debug` may have a value too."""


def join_values(argv: Sequence[str]) -> list[str]:
    """Return the command line with `--option value` as one word, `--option=value`.

    A word that stands alone is the dataset: `FOLDER` is short for `--data.root FOLDER`.
    """
    words: list[str] = []
    for word in argv:
        previous = words[-1] if words else ""
        takes_value = previous.startswith("--") and "=" not in previous and previous not in _FLAGS
        if previous == "--debug":
            takes_value = word in ("true", "false")
        if takes_value and not word.startswith("--"):
            words[-1] = f"{previous}={word}"
        else:
            words.append(word)
    return words


def is_dataset(word: str) -> bool:
    """Return whether a word of `join_values` is the folder of a dataset."""
    return bool(word) and not word.startswith("-")
