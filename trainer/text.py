"""Format file and class names, which may contain any bytes, for a terminal."""

from collections.abc import Iterable, Sequence
from itertools import islice

_MAX_LINE = 300  # characters of a foreign message


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


def shorten(name: str, *, limit: int = 40) -> str:
    """Return a name, escaped by `escape_unprintable`, with at most `limit` characters."""
    shown = escape_unprintable(name)
    return shown if len(shown) <= limit else f"{shown[: limit - 1]}…"


def list_lines(lines: Sequence[str], *, limit: int = 10) -> str:
    """Return the first `limit` lines, each indented on a line of its own, and the number of other lines."""
    shown = "".join(f"\n  {line}" for line in lines[:limit])
    return f"{shown}\n  and {len(lines) - limit} more" if len(lines) > limit else shown


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, escaped, or the name of its class if it has none."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return escape_unprintable(lines[0])[:_MAX_LINE]


def has_invalid_utf8(text: str) -> bool:
    """Return whether a text contains bytes that are not UTF-8, which Python represents as surrogates."""
    return not text.isascii() and any("\udc80" <= character <= "\udcff" for character in text)
