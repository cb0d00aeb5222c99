"""The images that a command names: files, folders, patterns, a list on standard input, a column of a CSV."""

# Creating a Path for each of a million images would take longer than listing them.
# ruff: noqa: PTH112, PTH118, PTH120, PTH100, PTH111, PTH113, PTH207

import codecs
import glob
import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from trainer.data.csv.columns import find_path_column
from trainer.data.csv.records import read_records
from trainer.data.folders.scan import Scan
from trainer.errors import UserError
from trainer.text import escape_unprintable, join_truncated

STANDARD_INPUT = "-"
TABLES = (".csv", ".tsv")
_EXPECTED = (
    "expected images, folders, patterns such as 'photos/*.jpg', a .csv with a column of paths, or - for a list on "
    "standard input"
)


@dataclass
class ImageLister:
    """Lists the images that words of a command line name."""

    extensions: tuple[str, ...]
    """File extensions of the images in folders, in lower case with their dot."""
    column: str | None = None
    """Column of the paths in a CSV; None: it is recognized by its name."""
    excluded: Path | None = None
    """Folder whose images are left out."""
    _ignored: Counter[str] = field(default_factory=Counter)

    def find(self, words: Sequence[str], stdin: BinaryIO | None) -> tuple[list[str], list[str]]:
        """Return the paths of the images, each once and in the order of the words, and notes for the user.

        A path that a list or a CSV names need not exist.

        Raises:
            UserError: a word names nothing, a folder or a CSV cannot be read, or there are no images.

        """
        listed = [path for word in words for path in self._expand(word, stdin)]
        if self.excluded is not None:
            folder = os.path.join(os.path.abspath(self.excluded), "")
            listed = [path for path in listed if not os.path.abspath(path).startswith(folder)]
        paths = list(dict.fromkeys(listed))
        ignored = ", ".join(f"{count} {extension}" for extension, count in sorted(self._ignored.items()))
        if not paths:
            found = f" (other files: {ignored})" if ignored else ""
            raise UserError(f"{join_truncated(words, limit=3)}: no images{found}; {_EXPECTED}")
        notes = [f"other files in the folders, which are ignored: {ignored}"] if ignored else []
        if repeated := len(listed) - len(paths):
            notes.append(f"images that are named more than once, predicted once: {repeated}")
        return paths, notes

    def _expand(self, word: str, stdin: BinaryIO | None) -> Iterable[str]:
        if word == STANDARD_INPUT:
            return _read_list(stdin)
        path = os.path.expanduser(word)
        if os.path.isdir(path):
            return self._list_folder(path)
        if path.lower().endswith(TABLES) and os.path.isfile(path):
            return self._read_column(Path(path))
        try:
            os.lstat(path)  # a broken link is an image that cannot be read
        except (OSError, ValueError) as error:  # ValueError: a null byte
            matches = sorted(glob.glob(path, recursive=True)) if glob.has_magic(path) else []
            if matches:
                files = [match for match in matches if not os.path.isdir(match)]
                return files or itertools.chain.from_iterable(map(self._list_folder, matches))
            reason = "no file matches" if glob.has_magic(path) else getattr(error, "strerror", None) or str(error)
            raise UserError(f"{escape_unprintable(word)}: {reason}; {_EXPECTED}") from None
        return [path]

    def _list_folder(self, folder: str) -> list[str]:
        scan = Scan(self.extensions)
        images, ignored = scan.find_images(folder)
        self._ignored += ignored
        return images

    def _read_column(self, file: Path) -> Iterator[str]:
        """Yield the paths in a CSV; relative ones start from its folder."""
        folder = os.path.dirname(file)  # empty for a file in the working folder, unlike `file.parent`
        try:
            records = read_records(file)
            _, header = next(records, (0, []))
            position = find_path_column(escape_unprintable(str(file)), header, self.column)
            for line, fields in records:
                name = fields[position].strip() if position < len(fields) else ""
                if not name:
                    raise UserError(f"{escape_unprintable(str(file))}, line {line}: the path is empty")
                yield os.path.join(folder, os.path.expanduser(name))
        except UserError as error:  # the reader of datasets calls the file data.root
            raise UserError(str(error).removeprefix("data.root ")) from None


def _read_list(stdin: BinaryIO | None) -> list[str]:
    """Return the lines of standard input, or its parts between null bytes, as `find -print0` writes them."""
    content = stdin.read().removeprefix(codecs.BOM_UTF8) if stdin is not None else b""
    separator = b"\0" if b"\0" in content else b"\n"
    lines = content.split(separator)
    return [os.fsdecode(line.removesuffix(b"\r") if separator == b"\n" else line) for line in lines if line.strip()]
