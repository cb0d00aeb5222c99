"""Validate images: decode each image once and cache the result for the next start."""

# Creating a Path for each of a million images would take longer than the cache lookup.
# ruff: noqa: PTH100, PTH116

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Collection, Generator, Iterable, Mapping, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import PIL

from trainer.data.decode import DECODE_VERSION, UnreachableImage, UnreadableImage, decode
from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically
from trainer.text import escape_unprintable

_BATCH_SIZE = 16  # images that a thread decodes per task


class ValidationResult(NamedTuple):
    """Validation result of one version of a file."""

    size: int
    """Size of the file [bytes]."""
    mtime_ns: int
    """Modification time of the file [ns]."""
    reason: str | None
    """Reason why the image cannot be read; None if it can."""


def check_images(
    paths: Iterable[str], *, cache: Path, workers: int, on_progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """Return path -> reason for each image that cannot be read.

    Results are cached in `cache`/verdicts, in one file per dataset folder. A result is valid for one path, size and
    modification time, so only new and changed images are decoded. The results so far are saved on an interruption.

    Args:
        paths: paths of the images.
        cache: cache folder; created if needed.
        workers: number of threads that decode (Pillow releases the GIL while it decodes).
        on_progress: called from time to time with (images checked, total images).

    Raises:
        UserError: the cache cannot be written.

    """
    images = {path: os.path.abspath(path) for path in paths}
    if not images:
        return {}
    folder = _common_folder(images.values())
    file = cache / "verdicts" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.json"
    results = _read_cache(file, folder)
    versions = {path: _file_version(path) for path in images}
    unreadable: dict[str, str] = {}
    pending: list[str] = []
    for path, absolute in images.items():
        result = results.get(absolute[len(folder) :])
        if result is None or result[:2] != versions[path]:
            pending.append(path)
        elif result.reason is not None:
            unreadable[path] = result.reason
    if not pending:
        return unreadable
    _check_writable(file.parent)
    done = len(images) - len(pending)
    with closing(_validate_batches(pending, workers)) as batches:
        try:
            for batch in batches:
                for path, reason, permanent in batch:
                    if reason is not None:
                        unreadable[path] = reason
                    version = versions[path]
                    if permanent and version is not None:
                        results[images[path][len(folder) :]] = ValidationResult(*version, reason)
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(images))
        finally:
            _write_cache(file, folder, results, current={absolute[len(folder) :] for absolute in images.values()})
    return unreadable


def unreadable_error(unreadable: Mapping[str, str], total: int) -> UserError:
    """Return the error that lists all unreadable images (path -> reason) out of `total`."""
    listed = "".join(f"\n  {escape_unprintable(path)}: {reason}" for path, reason in sorted(unreadable.items()))
    return UserError(
        f"{len(unreadable)} of {total} images cannot be read:{listed}\nRepair, replace or remove them, or "
        "skip them with --data.on_unreadable skip"
    )


def _common_folder(paths: Collection[str]) -> str:
    """Return the deepest common folder of absolute paths, with a trailing slash."""
    # The common prefix of the first and the last path in sorted order is common to all.
    return os.path.commonprefix([min(paths), max(paths)]).rpartition("/")[0] + "/"  # noqa: RUF071


def _validate_batches(paths: Sequence[str], workers: int) -> Generator[list[tuple[str, str | None, bool]], None, None]:
    """Yield batches of (path, reason why it cannot be read or None, whether the result is permanent)."""
    stop = threading.Event()

    def validate(start: int) -> list[tuple[str, str | None, bool]]:
        return [(path, *_validate(path)) for path in paths[start : start + _BATCH_SIZE] if not stop.is_set()]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="check") as pool:
        try:
            yield from pool.map(validate, range(0, len(paths), _BATCH_SIZE))
        finally:
            stop.set()  # after Ctrl-C, each thread finishes the image that it is decoding


def _validate(path: str) -> tuple[str | None, bool]:
    try:
        decode(path)
    except UnreachableImage as error:
        return str(error), False
    except UnreadableImage as error:
        return str(error), True
    return None, True


def _file_version(path: str) -> tuple[int, int] | None:
    """Return the size [bytes] and the modification time [ns] of a file; None if they cannot be read."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _check_writable(folder: Path) -> None:
    """Create the cache folder and write to it, so that a problem is found before the images are decoded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _read_cache(file: Path, folder: str) -> dict[str, ValidationResult]:
    """Return path relative to `folder` -> cached result.

    The result is empty if the file is missing, damaged or from another decoder version: all images are then decoded
    again and the file is replaced.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["rules"] != _decoder_version() or content["folder"] != folder:
            return {}
        return {name: _parse_result(entry) for name, entry in content["images"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _parse_result(entry: Any) -> ValidationResult:
    size, mtime_ns, reason = entry
    if type(size) is not int or type(mtime_ns) is not int or not isinstance(reason, str | None):
        raise TypeError(f"not a validation result: {entry!r}")
    return ValidationResult(size, mtime_ns, reason)


def _write_cache(file: Path, folder: str, results: Mapping[str, ValidationResult], *, current: Set[str]) -> None:
    """Write the results; those of images outside `current` are kept if their files exist."""
    kept = {name: r for name, r in results.items() if name in current or os.path.lexists(folder + name)}
    try:
        write_text_atomically(file, json.dumps({"rules": _decoder_version(), "folder": folder, "images": kept}))
    except OSError as error:
        raise _unwritable(file.parent, error) from None


def _decoder_version() -> str:
    """Return the version of the decoder; results of another version are ignored."""
    return f"{DECODE_VERSION}, Pillow {PIL.__version__}"


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache: the validation results cannot be written to {escape_unprintable(str(folder))} "
        f"({error.strerror}). Set data.cache (or $REGRAFT_CACHE) to a writable folder"
    )
