"""Validation results as arrays, and the file that caches them: 36 bytes for each image, and its name."""

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from trainer.data.deferred_checks import DeferredChecks
from trainer.data.file_versions import MISSING_VERSION, FileVersion
from trainer.run.atomic import write_atomically

SEPARATOR = "\0"  # the only character that no path has


class Outcome(NamedTuple):
    """What the validation has found, apart from the content itself. Most images have the same outcome."""

    reason: str | None
    """Reason why the image cannot be read; None if it can."""
    conversions: tuple[str, ...]
    """What was done to its pixels, where the file left a choice."""
    is_one_color: bool
    """Whether all of its pixels are equal."""


class ValidationResult(NamedTuple):
    """Validation result of one content of a file."""

    version: FileVersion | None
    """None if the file does not exist or cannot be reached."""
    digest: str
    """Hash of the content, 16 hexadecimal digits; empty if the file cannot be read."""
    reason: str | None
    """Reason why the image cannot be read; None if it can."""
    conversions: tuple[str, ...]
    """What was done to its pixels, where the file left a choice."""
    is_one_color: bool
    """Whether all of its pixels are equal."""


class ValidationResults:
    """Validation results of N images, in the order of their paths. Each row is set once."""

    def __init__(
        self, versions: np.ndarray, digests: np.ndarray, codes: np.ndarray, outcomes: Iterable[Outcome] = ()
    ) -> None:
        """Create the results.

        Args:
            versions: int64 [N, 3], the `FileVersion` of each image; -1 if it has none.
            digests: uint64 [N], the hash of each content; 0 if it cannot be read.
            codes: int32 [N], index into `outcomes`.
            outcomes: all different outcomes.

        """
        self.versions, self.digests, self.codes = versions, digests, codes
        self.outcomes = list(outcomes)
        self.deferred: DeferredChecks | None = None
        """What the files have to be that were not compared at this start; None if all were compared."""
        self._code_of = {outcome: code for code, outcome in enumerate(self.outcomes)}

    @classmethod
    def empty(cls, versions: np.ndarray) -> Self:
        """Return results whose rows are to be set, for files of these versions."""
        return cls(versions, np.zeros(len(versions), np.uint64), np.full(len(versions), -1, np.int32))

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, row: int) -> ValidationResult:
        digest = int(self.digests[row])
        return ValidationResult(
            self.version(row), f"{digest:016x}" if digest else "", *self.outcomes[int(self.codes[row])]
        )

    def __setitem__(self, row: int, result: ValidationResult) -> None:
        self.versions[row] = MISSING_VERSION if result.version is None else result.version
        self.digests[row] = int(result.digest or "0", 16)
        self.codes[row] = self._code(Outcome(result.reason, result.conversions, result.is_one_color))

    def version(self, row: int) -> FileVersion | None:
        """Return the version of a file; None if it does not exist or cannot be reached."""
        size, mtime_ns, ctime_ns = self.versions[row].tolist()
        return FileVersion(size, mtime_ns, ctime_ns) if size >= 0 else None

    def copy_rows(self, rows: np.ndarray, other: "ValidationResults", other_rows: np.ndarray) -> None:
        """Set rows to those of other results."""
        codes = np.array([self._code(outcome) for outcome in other.outcomes], dtype=np.int32)
        self.versions[rows] = other.versions[other_rows]
        self.digests[rows] = other.digests[other_rows]
        self.codes[rows] = codes[other.codes[other_rows]]

    def where(self, condition: Callable[[Outcome], bool]) -> np.ndarray:
        """Return the rows whose outcome meets a condition, in order."""
        codes = [code for code, outcome in enumerate(self.outcomes) if condition(outcome)]
        return np.flatnonzero(np.isin(self.codes, codes))

    def unreadable(self, paths: Sequence[str]) -> dict[str, str]:
        """Return path -> reason of the images that cannot be read; `paths` has all images in order."""
        rows = self.where(lambda outcome: outcome.reason is not None).tolist()
        return {paths[row]: str(self.outcomes[self.codes[row]].reason) for row in rows}

    def _code(self, outcome: Outcome) -> int:
        if outcome not in self._code_of:
            self._code_of[outcome] = len(self.outcomes)
            self.outcomes.append(outcome)
        return self._code_of[outcome]


def read_results(file: Path, metadata: Mapping[str, str]) -> tuple[str, ValidationResults]:
    """Return what `write_results` wrote: the joined names and their results.

    The result is empty if the file is missing, damaged or has other metadata: all images are then decoded again and
    the file is replaced.
    """
    try:
        with safe_open(file, framework="numpy") as content:
            saved = dict(content.metadata() or {})
            outcomes = [_parse_outcome(entry) for entry in json.loads(saved.pop("outcomes"))]
            if saved != _escape(metadata):
                raise ValueError("results of another folder or decoder")
            arrays = {name: content.get_tensor(name) for name in ("names", "versions", "digests", "codes")}
            return _check_arrays(**arrays, outcomes=outcomes)
    except (OSError, SafetensorError, ValueError, TypeError, LookupError, RecursionError):
        return "", ValidationResults.empty(np.empty((0, 3), np.int64))


def write_results(file: Path, names: str, results: ValidationResults, metadata: Mapping[str, str]) -> None:
    """Write results atomically, with the joined names of their images; raises OSError."""
    arrays = {
        "names": np.frombuffer(os.fsencode(names), dtype=np.uint8),
        "versions": results.versions,
        "digests": results.digests,
        "codes": results.codes,
    }
    content = save(arrays, _escape(metadata) | {"outcomes": json.dumps(results.outcomes)})
    write_atomically(file, lambda temporary: temporary.write_bytes(content))


def join_names(names: Iterable[str]) -> str:
    """Return the names in one string, which takes a third of the memory."""
    return SEPARATOR.join(names)


def split_names(joined: str) -> list[str]:
    """Return the names that `join_names` joined; at least one."""
    return joined.split(SEPARATOR)


def _escape(metadata: Mapping[str, str]) -> dict[str, str]:
    """Return metadata as ASCII; a folder may have any bytes in its name."""
    return {key: json.dumps(value) for key, value in metadata.items()}


def _check_arrays(
    *, names: np.ndarray, versions: np.ndarray, digests: np.ndarray, codes: np.ndarray, outcomes: list[Outcome]
) -> tuple[str, ValidationResults]:
    joined = os.fsdecode(names.tobytes())
    count = joined.count(SEPARATOR) + 1
    expected = ((versions, np.int64, (count, 3)), (digests, np.uint64, (count,)), (codes, np.int32, (count,)))
    if not all(array.dtype == dtype and array.shape == shape for array, dtype, shape in expected):
        raise ValueError("arrays of different lengths or types")
    if versions.min() < 0 or codes.min() < 0 or codes.max() >= len(outcomes):
        raise ValueError("a version or an outcome that does not exist")
    return joined, ValidationResults(versions, digests, codes, outcomes)


def _parse_outcome(entry: Any) -> Outcome:
    reason, conversions, is_one_color = entry
    is_valid = isinstance(conversions, list) and all(isinstance(text, str) for text in conversions)
    if not (is_valid and isinstance(reason, str | None) and isinstance(is_one_color, bool)):
        raise TypeError(f"not an outcome: {entry!r}")
    return Outcome(reason, tuple(conversions), is_one_color)
