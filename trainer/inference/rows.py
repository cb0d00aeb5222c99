"""The rows of a command's output, and the files they are written to: CSV, JSON Lines or Parquet."""

import csv
import importlib.util
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from trainer.errors import UserError
from trainer.inference.answers import Prediction
from trainer.run.atomic import write_atomically
from trainer.text import escape_unprintable

FORMATS = (".csv", ".jsonl", ".parquet")
_PARQUET_ROWS = 10_000  # of a row group


class Row(NamedTuple):
    """An image, and its prediction or the reason why it cannot be read."""

    path: str
    prediction: Prediction | None
    error: str | None = None

    def to_fields(self) -> dict[str, Any]:
        """Return the row as a JSON object."""
        if self.prediction is None:
            return {"path": self.path, "error": self.error}
        found = self.prediction
        return {
            "path": self.path,
            "label": found.label,
            "score": found.score,
            "labels": list(found.labels),
            "scores": list(found.scores),
        }

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> "Row":
        """Return the row of a JSON object; raises KeyError, TypeError or ValueError for another object."""
        if fields.get("error") is not None:
            return cls(str(fields["path"]), None, str(fields["error"]))
        labels, scores = tuple(map(str, fields["labels"])), tuple(map(float, fields["scores"]))
        is_unknown = fields["label"] != labels[0]
        return cls(str(fields["path"]), Prediction(labels, scores, is_unknown))


@dataclass(frozen=True)
class CsvColumns:
    """Columns of a CSV."""

    ranks: int
    """Number of pairs label_1, score_1, ...; 0 leaves them out."""

    def header(self) -> list[str]:
        """Return the names of the columns."""
        pairs = [(f"label_{rank}", f"score_{rank}") for rank in range(1, self.ranks + 1)]
        return ["path", "label", "score", *itertools.chain.from_iterable(pairs), "error"]

    def fields(self, row: Row) -> list[object]:
        """Return the values of a row."""
        if row.prediction is None:
            return [row.path, "", "", *[""] * (2 * self.ranks), row.error]
        found = row.prediction
        pairs = list(zip(found.labels, found.scores, strict=True))[: self.ranks]
        return [row.path, found.label, found.score, *itertools.chain.from_iterable(pairs), ""]


def write_csv_rows(stream: IO[str], rows: Iterable[Sequence[object]]) -> None:
    """Write rows of a CSV; fields with commas, quotes or line ends are quoted."""
    minimal = csv.writer(stream, lineterminator="\n")
    quoted = csv.writer(stream, lineterminator="\n", quoting=csv.QUOTE_ALL)
    for row in rows:
        # Python's writer does not quote a carriage return, which its reader takes for the end of the row.
        (quoted if any("\r" in str(field) for field in row) else minimal).writerow(row)


def check_format(path: Path) -> None:
    """Check the name of an output file.

    Raises:
        UserError: its extension is none of FORMATS, or a package for it is missing.

    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"--output {escape_unprintable(str(path))}: expected a name that ends in .csv, .jsonl or .parquet"
        )
    if path.suffix.lower() == ".parquet" and importlib.util.find_spec("pyarrow") is None:
        raise UserError(
            f"--output {escape_unprintable(str(path))}: Parquet needs the package pyarrow: pip install "
            "'regraft[parquet]', or write a .csv or .jsonl"
        )


def write_rows(path: Path, rows: Sequence[Row], columns: CsvColumns) -> None:
    """Write rows into a file in the format of its extension; the file is complete or absent.

    Raises:
        OSError: it cannot be written.

    """
    write = {".csv": _write_csv, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[path.suffix.lower()]
    write_atomically(path, lambda temporary: write(temporary, rows, columns))


def _write_csv(path: Path, rows: Iterable[Row], columns: CsvColumns) -> None:
    # File and class names may hold bytes that are not UTF-8, which Python represents as surrogates.
    with path.open("w", encoding="utf-8", errors="surrogateescape", newline="") as stream:
        write_csv_rows(stream, [columns.header()])
        write_csv_rows(stream, map(columns.fields, rows))


def _write_jsonl(path: Path, rows: Iterable[Row], _: CsvColumns) -> None:
    with path.open("w", encoding="ascii") as stream:
        stream.writelines(json.dumps(row.to_fields()) + "\n" for row in rows)


def _write_parquet(path: Path, rows: Sequence[Row], _: CsvColumns) -> None:
    import pyarrow as pa  # noqa: PLC0415 (optional)
    import pyarrow.parquet as pq  # noqa: PLC0415

    text, number = pa.string(), pa.float32()
    schema = pa.schema(
        {"path": text, "label": text, "score": number, "labels": pa.list_(text), "scores": pa.list_(number)}
        | {"error": text}
    )
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, len(rows), _PARQUET_ROWS):
            fields = [_valid_utf8(row.to_fields()) for row in rows[start : start + _PARQUET_ROWS]]
            writer.write_table(pa.Table.from_pylist(fields, schema))


def _valid_utf8(fields: dict[str, Any]) -> dict[str, Any]:
    r"""Return the fields with bytes that are not UTF-8 as `\xff`, since Parquet's strings must be UTF-8."""

    def convert(value: Any) -> Any:
        if isinstance(value, str):
            return value.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        return [convert(item) for item in value] if isinstance(value, list) else value

    return {key: convert(value) for key, value in fields.items()}


def in_order(rows: Iterable[Row], paths: Sequence[str]) -> Iterator[Row]:
    """Yield rows in the order of `paths`; those of other paths come last."""
    by_path = {row.path: row for row in rows}
    for path in paths:
        if (row := by_path.pop(path, None)) is not None:
            yield row
    yield from by_path.values()
