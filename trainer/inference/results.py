"""What a command does with the rows of predicted images: print or save them, sort the images, and sum them up."""

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol, Self

from regraft.streams import discard_output
from trainer.errors import UserError
from trainer.inference.journal import Journal
from trainer.inference.rows import CsvColumns, Row, write_csv_rows
from trainer.inference.sort_into import ImageSorter
from trainer.text import escape_unprintable, join_truncated, list_lines, shorten


class Results(Protocol):
    """The rows of a command so far."""

    rows: dict[str, Row]
    """Path of an image -> its row."""
    is_saved: bool
    """Whether the rows are saved, so that the same command goes on from them."""

    def add(self, rows: Sequence[Row]) -> None:
        """Print or save the rows of a batch."""

    def finish(self) -> None:
        """Write the output of all rows."""

    def __enter__(self) -> Self:
        """Return the object; its end closes the file."""

    def __exit__(self, *_: object) -> None: ...


@dataclass
class PrintedResults:
    """Prints a CSV to standard output, in the order of the paths."""

    paths: Sequence[str]
    columns: CsvColumns
    rows: dict[str, Row] = field(default_factory=dict)
    is_saved: bool = False
    _printed: int = 0

    def add(self, rows: Sequence[Row]) -> None:
        """Print the rows whose predecessors are printed."""
        if not self.rows:
            self._print([self.columns.header()])
        self.rows.update((row.path, row) for row in rows)
        ready = []
        while self._printed < len(self.paths) and (row := self.rows.get(self.paths[self._printed])) is not None:
            ready.append(self.columns.fields(row))
            self._printed += 1
        self._print(ready)

    def _print(self, rows: Iterable[Sequence[object]]) -> None:
        try:
            write_csv_rows(sys.stdout, rows)
            sys.stdout.flush()
        except OSError as error:
            if isinstance(error, BrokenPipeError):
                raise
            discard_output()
            raise UserError(f"standard output cannot be written ({error.strerror})") from None

    def finish(self) -> None:
        """Do nothing: all rows are printed."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class SavedResults:
    """Saves the rows in a journal, and writes the output at the end or at a stop."""

    is_saved = True

    def __init__(self, output: Path, paths: Sequence[str], columns: CsvColumns, identity: dict[str, object]) -> None:
        """Open the journal.

        Args:
            output: the file to write.
            paths: all images, in the order of the output.
            columns: of a CSV.
            identity: see `Journal.open`.

        Raises:
            UserError: see `Journal.open`.

        """
        self._journal = Journal.open(output, identity)
        self._paths, self._columns = paths, columns
        self.rows = self._journal.rows

    def add(self, rows: Sequence[Row]) -> None:
        """Save rows; raises a UserError if they cannot be written."""
        self._journal.append(rows)

    def finish(self) -> None:
        """Write the output from all rows; raises a UserError if it cannot be written."""
        is_complete = all(path in self.rows for path in self._paths)
        self._journal.write_output(self._paths, self._columns, is_complete=is_complete)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def consume(batches: Iterable[Sequence[Row]], results: Results, sorter: ImageSorter | None) -> Iterator[int]:
    """Sort the images and add the rows of each batch; yield the number of rows so far.

    Raises:
        UserError: something cannot be written.

    """
    for rows in batches:
        # An image is sorted before its row is saved. After a kill in between, it is found in its folder.
        if sorter is not None:
            for row in rows:
                sorter.add(row)
        if rows:
            results.add(rows)
        yield len(results.rows)


def summary(rows: Sequence[Row]) -> Iterator[str]:
    """Yield lines with the images that cannot be read, and with the number of images of each class."""
    errors = [f"{escape_unprintable(row.path)}: {row.error}" for row in rows if row.prediction is None]
    if errors:
        yield f"{len(errors)} of {len(rows)} images cannot be read:{list_lines(errors)}"
    labels = Counter(row.prediction.label for row in rows if row.prediction is not None)
    if labels:
        counts = join_truncated(f"{shorten(label)} {count}" for label, count in labels.most_common())
        yield f"{labels.total()} images predicted: {counts}"
