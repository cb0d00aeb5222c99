"""Format file and class names, which may contain any bytes, for a terminal."""

from collections.abc import Iterable
from itertools import islice


def escape_unprintable(text: str) -> str:
    r"""Return `text` on one line, with unprintable characters escaped.

    Bytes that are not UTF-8, which Python represents as surrogates, become `\xff`, since surrogates cannot be printed.
    Line breaks and control characters are escaped, since they could add or hide lines of a list.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escape(character) for character in text)


def _escape(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def join_truncated(names: Iterable[str], *, limit: int = 10) -> str:
    """Return the first `limit` names, escaped by `escape_unprintable`, and the number of other names."""
    rest = iter(names)
    shown = ", ".join(escape_unprintable(name) for name in islice(rest, limit))
    more = sum(1 for _ in rest)
    return f"{shown} and {more} more" if more else shown


def has_invalid_utf8(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8, which Python represents as surrogates."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
