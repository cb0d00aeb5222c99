"""The rows of an output that is not complete, so that the same command goes on after a stop, a kill or a full disk.

They are appended to `OUTPUT.partial`: a line of JSON with the model and the options, then a line for each image. The
output itself is written from it, as a whole.
"""

import fcntl
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.inference.rows import CsvColumns, Row, in_order, write_rows
from trainer.text import escape_unprintable

_FORMAT = 1


@dataclass(frozen=True)
class Journal:
    """The rows of an output so far, in a file that this process has locked."""

    output: Path
    path: Path
    rows: dict[str, Row]
    """Path of an image -> its row. Of an earlier command, without the images that could not be read."""
    _file: FileIO

    @classmethod
    def open(cls, output: Path, identity: Mapping[str, object]) -> "Journal":
        """Open the journal of an output: a new one, or that of an earlier command with the same identity.

        Args:
            output: the file to write.
            identity: what the rows depend on: the model and the options.

        Raises:
            UserError: the output exists and is complete, or is of another model or other options; another process
                writes it; or it cannot be written.

        """
        path = output.with_name(f"{output.name}.partial")
        shown = escape_unprintable(str(output))
        # These functions of os.path return False without permission: os.open tells it.
        if os.path.isdir(output):  # noqa: PTH112
            raise UserError(f"--output {shown}: this is a folder; expected the name of a file")
        exists = UserError(f"--output {shown}: exists, and is not overwritten; remove it or choose another name")
        if not os.path.exists(path) and os.path.lexists(output):  # noqa: PTH110
            raise exists
        try:
            file = FileIO(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+")
        except OSError as error:
            raise UserError(f"--output {shown}: cannot be written ({error.strerror})") from None
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            content = file.readall()
            if not content and os.path.lexists(output):  # another command has written it just now
                path.unlink()
            if not os.fstat(file.fileno()).st_nlink:
                raise exists
            rows, end = _read(content, dict(identity), path)
            file.truncate(end)
            file.seek(end)
        except BlockingIOError:
            file.close()
            raise UserError(f"--output {shown}: another command is writing it") from None
        except OSError as error:
            file.close()
            raise UserError(f"{escape_unprintable(str(path))}: cannot be read ({error.strerror})") from None
        except BaseException:
            file.close()
            raise
        journal = cls(output, path, rows, file)
        if not end:
            try:
                journal._write({"format": _FORMAT, **identity})
            except UserError:
                path.unlink()
                file.close()
                raise
        return journal

    def append(self, rows: Sequence[Row]) -> None:
        """Add rows.

        Raises:
            UserError: they cannot be written.

        """
        self._write(*(row.to_fields() for row in rows))
        self.rows.update((row.path, row) for row in rows)

    def _write(self, *entries: Mapping[str, Any]) -> None:
        data = "".join(json.dumps(entry) + "\n" for entry in entries).encode("ascii")
        try:
            while data:  # a disk may have room for a part of it
                data = data[self._file.write(data) or 0 :]
        except OSError as error:
            raise UserError(
                f"{escape_unprintable(str(self.path))}: cannot be written ({error.strerror}). The same command goes on "
                f"from image {len(self.rows)}"
            ) from None

    def write_output(self, paths: Sequence[str], columns: CsvColumns, *, is_complete: bool) -> None:
        """Write the output from all rows, in the order of `paths`; remove the journal if the output is complete.

        Raises:
            UserError: it cannot be written; the journal keeps the rows.

        """
        try:
            os.fsync(self._file.fileno())
            write_rows(self.output, list(in_order(self.rows.values(), paths)), columns)
            if is_complete:
                self.path.unlink()
        except OSError as error:
            raise UserError(
                f"--output {escape_unprintable(str(self.output))}: cannot be written ({error.strerror}). The rows are "
                f"in {escape_unprintable(self.path.name)}; the same command writes the output from them"
            ) from None

    def close(self) -> None:
        """Close and unlock the file."""
        self._file.close()


def _read(content: bytes, identity: dict[str, object], path: Path) -> tuple[dict[str, Row], int]:
    """Return the rows of a journal, and where its last complete line ends.

    Raises:
        UserError: it is not a journal, or has another identity.

    """
    end = content.rfind(b"\n") + 1  # the line after it was cut off by a kill
    first, *lines = content[:end].split(b"\n")[:-1] or [b""]
    if not first:
        if content:
            raise UserError(f"{escape_unprintable(str(path))}: not a partial output of regraft predict; move it away")
        return {}, 0
    shown = escape_unprintable(str(path))
    try:
        header = json.loads(first)
        rows = [Row.from_fields(json.loads(line)) for line in lines]
        if not isinstance(header, dict) or header.pop("format") != _FORMAT:
            raise ValueError("format")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, RecursionError):
        raise UserError(f"{shown}: not a partial output of this version of regraft predict; move it away") from None
    differing = [key for key in identity | header if header.get(key) != identity.get(key)]
    if differing:
        raise UserError(
            f"{shown}: was begun with another {', '.join(differing)}; remove it to begin again, or choose another "
            "--output"
        )
    # An image that could not be read is tried again: it may have been on a disk that was not there.
    return {row.path: row for row in rows if row.prediction is not None}, end
