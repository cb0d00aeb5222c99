"""Validate images: decode and hash each image once and cache the result for the next start."""

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

from PIL import Image

from trainer.data.decode import (
    UnreachableImage,
    UnreadableImage,
    decode_file,
    decoder_version,
    hash_file,
    open_image_file,
)
from trainer.data.pixels import is_one_color
from trainer.errors import UserError
from trainer.run.atomic import write_text_atomically
from trainer.text import escape_unprintable

OnDecoded = Callable[[str, str, Image.Image], None]
"""Called with (path, digest, decoded image), from several threads."""
_BATCH_SIZE = 16  # images that a thread decodes per task


class FileVersion(NamedTuple):
    """What the file system says about the content of a file."""

    size: int
    """Size of the file [bytes]."""
    mtime_ns: int
    """Time of the last modification [ns], which `touch`, `cp -p` and `rsync -t` set to any value."""
    ctime_ns: int
    """Time of the last change of the file or its metadata [ns], which only the file system sets."""


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


def check_images(
    paths: Iterable[str],
    *,
    cache: Path,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
    on_decoded: OnDecoded | None = None,
) -> dict[str, ValidationResult]:
    """Return path -> validation result of each image.

    Results are cached in `cache`/validation, in one file per dataset folder. An image is read again if its size or one
    of its times has changed, and decoded again if its content has. The results so far are saved on an interruption.

    Args:
        paths: paths of the images.
        cache: cache folder; created if needed.
        workers: number of threads that decode (Pillow releases the GIL while it decodes).
        on_progress: called from time to time with (images checked, total images).
        on_decoded: called for each readable image that is decoded.

    Raises:
        UserError: the cache cannot be written.

    """
    images = {path: os.path.abspath(path) for path in paths}
    if not images:
        return {}
    folder = _common_folder(images.values())
    file = cache / "validation" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.json"
    cached = _read_cache(file, folder)
    results: dict[str, ValidationResult] = {}
    pending: list[_Task] = []
    for path, absolute in images.items():
        version, result = _file_version(path), cached.get(absolute[len(folder) :])
        if result is not None and result.version == version:
            results[path] = result
        else:
            pending.append(_Task(path, version, result))
    if pending:
        _check_writable(file.parent)
        with closing(_validate_batches(pending, workers, on_decoded)) as batches:
            try:
                for batch in batches:
                    for path, result, permanent in batch:
                        results[path] = result
                        if permanent:
                            cached[images[path][len(folder) :]] = result
                    if on_progress is not None:
                        on_progress(len(results), len(images))
            finally:
                _write_cache(file, folder, cached, current={absolute[len(folder) :] for absolute in images.values()})
    return {path: results[path] for path in images}


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


class _Task(NamedTuple):
    path: str
    version: FileVersion | None
    cached: ValidationResult | None


def _validate_batches(
    tasks: Sequence[_Task], workers: int, on_decoded: OnDecoded | None
) -> Generator[list[tuple[str, ValidationResult, bool]], None, None]:
    """Yield batches of (path, result, whether the result is permanent)."""
    stop = threading.Event()

    def validate(start: int) -> list[tuple[str, ValidationResult, bool]]:
        return [
            (task.path, *_validate(task, on_decoded))
            for task in tasks[start : start + _BATCH_SIZE]
            if not stop.is_set()
        ]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="check") as pool:
        try:
            yield from pool.map(validate, range(0, len(tasks), _BATCH_SIZE))
        finally:
            stop.set()  # after Ctrl-C, each thread finishes the image that it is decoding


def _validate(task: _Task, on_decoded: OnDecoded | None) -> tuple[ValidationResult, bool]:
    digest = ""
    try:
        with open_image_file(task.path) as file:
            digest = hash_file(file)
            if task.cached is not None and task.cached.digest == digest:  # touched or copied
                return task.cached._replace(version=task.version), True
            image, conversions = decode_file(file, task.path)
    except UnreadableImage as error:
        is_permanent = task.version is not None and not isinstance(error, UnreachableImage)
        return ValidationResult(task.version, digest, str(error), (), is_one_color=False), is_permanent
    if on_decoded is not None and task.version is not None and _file_version(task.path) == task.version:
        on_decoded(task.path, digest, image)  # a file that changes just now may be decoded to other pixels
    result = ValidationResult(task.version, digest, None, conversions, is_one_color=is_one_color(image))
    return result, task.version is not None


def _file_version(path: str) -> FileVersion | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return FileVersion(status.st_size, status.st_mtime_ns, status.st_ctime_ns)


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
        if content["rules"] != decoder_version() or content["folder"] != folder:
            return {}
        return {name: _parse_result(entry) for name, entry in content["images"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _parse_result(entry: Any) -> ValidationResult:
    version, digest, reason, conversions, is_one_color = entry
    is_valid = isinstance(version, list) and len(version) == 3 and all(type(number) is int for number in version)
    is_valid &= isinstance(conversions, list) and all(isinstance(text, str) for text in (digest, *conversions))
    if not (is_valid and isinstance(reason, str | None) and isinstance(is_one_color, bool)):
        raise TypeError(f"not a validation result: {entry!r}")
    return ValidationResult(FileVersion(*version), digest, reason, tuple(conversions), is_one_color)


def _write_cache(file: Path, folder: str, results: Mapping[str, ValidationResult], *, current: Set[str]) -> None:
    """Write the results; those of images outside `current` are kept if their files exist."""
    kept = {name: r for name, r in results.items() if name in current or os.path.lexists(folder + name)}
    try:
        write_text_atomically(file, json.dumps({"rules": decoder_version(), "folder": folder, "images": kept}))
    except OSError as error:
        raise _unwritable(file.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache: the validation results cannot be written to {escape_unprintable(str(folder))} "
        f"({error.strerror}). Set data.cache (or $REGRAFT_CACHE) to a writable folder"
    )
