"""Names from a disk or a table, which may hold anything, as text that any terminal takes."""

from collections.abc import Iterable
from itertools import islice


def escape_unprintable(text: str) -> str:
    r"""Return `text` on one line, with what cannot be shown escaped.

    Bytes that are no UTF-8, which Python keeps as surrogates, come out as `\xff`: a console refuses to print
    them as they are. Line ends and control characters would forge or hide lines of a list.
    """
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else _escaped(character) for character in text)


def _escaped(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")


def join_truncated(names: Iterable[str], *, limit: int = 10) -> str:
    """Return the first `limit` names, printable, and how many more there are."""
    rest = iter(names)
    shown = ", ".join(escape_unprintable(name) for name in islice(rest, limit))
    more = sum(1 for _ in rest)
    return f"{shown} and {more} more" if more else shown
