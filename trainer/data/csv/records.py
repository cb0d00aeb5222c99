"""Read the records of a CSV with their line numbers; a file that is not a CSV raises a UserError."""

import csv
import itertools
import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TextIO

from trainer.errors import UserError
from trainer.text import escape_unprintable, has_invalid_utf8

_MAX_LINE_LENGTH = 1 << 20  # characters; a file without line ends is not a table and is not read to its end


def read_records(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield (first line number of the record, fields) of a CSV with any delimiter; skip blank lines and empty rows.

    Raises:
        UserError: the file cannot be read, or is not a CSV in UTF-8.

    """
    try:
        # Bytes that are not UTF-8 are kept, because file names may contain them. Other columns are checked later.
        with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            yield from _records(file, stream)
    except OSError as error:
        raise UserError(f"{location(file)}: the file cannot be read ({error.strerror})") from None


def location(file: Path, line: int | None = None) -> str:
    """Return the location of an error for a message."""
    return f"data.root {escape_unprintable(str(file))}" + (f", line {line}" if line else "")


def check_utf8(text: str, file: Path, line: int) -> None:
    """Raise a UserError if a text from a CSV contains bytes that are not UTF-8."""
    if has_invalid_utf8(text):
        raise UserError(
            f"{location(file, line)}: not UTF-8. Save the CSV as UTF-8 (in a spreadsheet program: 'CSV UTF-8')"
        )


def _records(file: Path, stream: TextIO) -> Iterator[tuple[int, list[str]]]:
    lines = _checked_lines(file, stream)
    skipped, header = next(((i, text) for i, text in enumerate(lines) if text.strip()), (0, ""))
    marked = re.fullmatch(r'"?sep=(.)"?\s*', header)  # Excel's line before the header, which names the delimiter
    if marked:
        skipped, header = skipped + 1, next(lines, "")
    second = next(lines, "")
    delimiter = marked[1] if marked else _find_delimiter(header, second)
    all_lines = itertools.chain([header], [second] if second else [], lines)
    reader = csv.reader(all_lines, delimiter=delimiter, strict=True, skipinitialspace=delimiter != " ")
    first_line = skipped + 1
    try:
        for fields in reader:
            if any(map(str.strip, fields)):
                yield first_line, fields
            first_line = skipped + reader.line_num + 1
    except csv.Error as error:
        raise UserError(
            f"{location(file, first_line)}: not a row of a CSV ({error}). Enclose a field that "
            'contains a delimiter, a quote or a line end in "...", and double the quotes in it'
        ) from None


def _find_delimiter(header: str, second: str) -> str:
    """Return the delimiter that divides the header into the most fields; those that divide the second line alike first.

    Spaces and colons count only if the header has none of the others.
    """

    def count_fields(line: str, delimiter: str) -> int:
        with suppress(csv.Error):  # the reader of the records tells the line
            return len(next(csv.reader([line], delimiter=delimiter, skipinitialspace=delimiter != " "), ()))
        return 0

    def rank(delimiter: str) -> tuple[bool, int]:
        count = count_fields(header, delimiter)
        return count > 1 and count_fields(second, delimiter) == count, count

    best = max(",;\t|", key=rank)
    return best if rank(best)[1] > 1 else max(f"{best} :", key=rank)


def _checked_lines(file: Path, stream: TextIO) -> Iterator[str]:
    lines = iter(lambda: stream.readline(_MAX_LINE_LENGTH + 1), "")
    for number, text in enumerate(lines, start=1):
        if "\0" in text:
            raise UserError(
                f"{location(file, number)}: a NUL byte, so this is not a CSV in UTF-8. "
                "Expected a folder (extract an archive first) or a CSV with the columns path, label and optionally "
                "split; in a spreadsheet program, save it as 'CSV UTF-8'"
            )
        if len(text) > _MAX_LINE_LENGTH:
            raise UserError(
                f"{location(file, number)}: more than {_MAX_LINE_LENGTH:,} characters, "
                "so this is not a CSV of images. Expected the columns path, label and optionally split"
            )
        yield text
