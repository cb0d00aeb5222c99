"""Validate images: decode and hash each image once and cache the result for the next start."""

# Creating a Path for each of a million images would take longer than the cache lookup.
# ruff: noqa: PTH100, PTH118

import hashlib
import itertools
import os
import tempfile
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

import numpy as np

from trainer.data.decode import (
    UnreachableImage,
    UnreadableImage,
    decode_file,
    decoder_version,
    hash_file,
    open_image_file,
)
from trainer.data.deferred_checks import DeferredChecks, FolderTimes, read_some_versions
from trainer.data.file_versions import FileVersion, read_versions
from trainer.data.pixels import is_one_color
from trainer.data.validation_results import (
    SEPARATOR,
    ValidationResult,
    ValidationResults,
    join_names,
    read_results,
    split_names,
    write_results,
)
from trainer.errors import UserError
from trainer.text import escape_unprintable

OnDecoded = Callable[[str, str, np.ndarray], None]
"""Called with (path, digest, decoded image: uint8 [H, W, 3]), from several threads."""
_BATCH_SIZE = 16  # images that a thread decodes per task
_QUEUED_BATCHES = 1024  # tasks that are in memory at once


def check_images(
    paths: Sequence[str],
    *,
    cache: Path,
    workers: int,
    on_progress: Callable[[int, int], None] | None,
    on_decoded: OnDecoded | None = None,
) -> ValidationResults:
    """Return the validation result of each image, in the order of the paths.

    Results are cached in `cache`/validation, in one file per dataset folder. An image is read again if its size or one
    of its times has changed, and decoded again if its content has. The results so far are saved on an interruption. Of
    a large dataset, most files are compared with their results later, see `deferred_checks`.

    Args:
        paths: paths of the images.
        cache: cache folder; created if needed.
        workers: number of threads that decode (Pillow releases the GIL while it decodes).
        on_progress: called from time to time with (images checked, total images).
        on_decoded: called for each readable image that is decoded.

    Raises:
        UserError: the cache cannot be written.

    """
    results = ValidationResults.empty(np.full((len(paths), 3), -1, dtype=np.int64))
    if not paths:
        return results
    folder, parents, names = _relative_names(paths)
    cache_file = cache / "validation" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.safetensors"
    metadata = {"rules": decoder_version(), "folder": folder}
    cached_names, cached = read_results(cache_file, metadata)
    rows = _find_rows(names, cached_names)
    found = np.flatnonzero(rows >= 0)
    results.copy_rows(found, cached, rows[found])
    times = FolderTimes(cache_file.with_suffix(".folders"), parents, names, count=len(paths))
    is_readable = np.zeros(len(paths), dtype=bool)
    is_readable[results.where(lambda outcome: outcome.reason is None)] = times.are_unchanged()
    versions, is_deferred = read_some_versions(paths, results.versions, is_readable)
    is_valid = (rows >= 0) & (versions == results.versions).all(axis=1)
    results.versions = versions
    if is_deferred.any():
        results.deferred = DeferredChecks(times.file, is_deferred, versions, results.digests)
    pending = np.flatnonzero(~is_valid).tolist()
    if not pending:
        if results.deferred is None:
            times.write()
        return results
    _check_writable(cache_file.parent)
    tasks = (
        _Task(paths[i], results.version(i), cached[row] if row >= 0 else None)
        for i, row in zip(pending, rows[pending].tolist(), strict=True)
    )
    done = len(paths) - len(pending)
    remaining = iter(pending)  # the batches have the order of the tasks
    with closing(_validate_batches(tasks, workers, on_decoded)) as batches:
        try:
            for batch in batches:
                for (_, result, permanent), i in zip(batch, remaining, strict=False):
                    results[i], is_valid[i] = result, permanent
                done += len(batch)
                if on_progress is not None:
                    on_progress(done, len(paths))
        finally:
            kept_names, kept = _merge((names, results, is_valid), (cached_names, cached, rows), folder)
            _write_cache(cache_file, kept_names, kept, metadata)
    times.write()
    return results


def unreadable_error(unreadable: Mapping[str, str], total: int) -> UserError:
    """Return the error that lists all unreadable images (path -> reason) out of `total`."""
    listed = "".join(f"\n  {escape_unprintable(path)}: {reason}" for path, reason in sorted(unreadable.items()))
    return UserError(
        f"{len(unreadable)} of {total} images cannot be read:{listed}\nRepair, replace or remove them, or "
        "skip them with --data.on_unreadable skip"
    )


def _relative_names(paths: Sequence[str]) -> tuple[str, set[str], str]:
    """Return the deepest folder of all images, with a trailing slash, their own folders, and their joined names.

    A name is a path relative to the first of these.
    """
    parents = {path[: path.rfind("/") + 1] for path in paths}
    absolute = {parent: os.path.join(os.path.abspath(parent), "") for parent in parents}
    # The common prefix of the first and the last folder in sorted order is common to all.
    folders = absolute.values()
    folder = os.path.commonprefix([min(folders), max(folders)]).rpartition("/")[0] + "/"  # noqa: RUF071
    if all(parent == path for parent, path in absolute.items()):
        joined = join_names(["", *paths]).replace(SEPARATOR + folder, SEPARATOR)
        return folder, parents, joined.removeprefix(SEPARATOR)
    relative = {parent: path[len(folder) :] for parent, path in absolute.items()}
    ends = [path.rfind("/") + 1 for path in paths]
    return folder, parents, join_names(relative[path[:end]] + path[end:] for path, end in zip(paths, ends, strict=True))


def _find_rows(names: str, cached_names: str) -> np.ndarray:
    """Return the position of each name among the cached names: int64 [N], -1 if it is not cached."""
    if cached_names.startswith(names) and cached_names[len(names) :][:1] in ("", SEPARATOR):  # after a complete check
        return np.arange(names.count(SEPARATOR) + 1)
    positions = {name: row for row, name in enumerate(split_names(cached_names))} if cached_names else {}
    return np.array([positions.get(name, -1) for name in split_names(names)], dtype=np.int64)


class _Task(NamedTuple):
    path: str
    version: FileVersion | None
    cached: ValidationResult | None


def _validate_batches(
    tasks: Iterator[_Task], workers: int, on_decoded: OnDecoded | None
) -> Generator[list[tuple[str, ValidationResult, bool]], None, None]:
    """Yield batches of (path, result, whether the result is permanent)."""
    stop = threading.Event()

    def validate(batch: Sequence[_Task]) -> list[tuple[str, ValidationResult, bool]]:
        return [(task.path, *_validate(task, on_decoded)) for task in batch if not stop.is_set()]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="check") as pool:
        try:
            while window := list(itertools.islice(tasks, _BATCH_SIZE * _QUEUED_BATCHES)):
                starts = range(0, len(window), _BATCH_SIZE)
                yield from pool.map(validate, [window[start : start + _BATCH_SIZE] for start in starts])
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
    if on_decoded is not None and tuple(read_versions([task.path])[0].tolist()) == task.version:
        on_decoded(task.path, digest, image)  # a file that changes just now may be decoded to other pixels
    result = ValidationResult(task.version, digest, None, conversions, is_one_color=is_one_color(image))
    return result, task.version is not None


def _check_writable(folder: Path) -> None:
    """Create the cache folder and write to it, so that a problem is found before the images are decoded."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _merge(
    checked: tuple[str, ValidationResults, np.ndarray], cached: tuple[str, ValidationResults, np.ndarray], folder: str
) -> tuple[str, ValidationResults]:
    """Return the results to cache. Earlier results of other images are kept if their files exist.

    Args:
        checked: names, their results, and whether each is permanent: bool [N].
        cached: names, their results, and the position of each checked name among them: int64 [N].
        folder: what the names are relative to.

    """
    (names, results, is_permanent), (cached_names, cached_results, rows) = checked, cached
    is_checked = np.zeros(len(cached_results), dtype=bool)
    is_checked[rows[rows >= 0]] = True
    is_replaced = np.zeros(len(cached_results), dtype=bool)
    is_replaced[rows[is_permanent & (rows >= 0)]] = True
    new_names, old_names = split_names(names), split_names(cached_names)
    new = np.flatnonzero(is_permanent)
    old = [row for row in np.flatnonzero(~is_replaced) if is_checked[row] or os.path.lexists(folder + old_names[row])]
    merged = ValidationResults.empty(np.zeros((len(new) + len(old), 3), dtype=np.int64))
    merged.copy_rows(np.arange(len(new)), results, new)
    merged.copy_rows(np.arange(len(new), len(merged)), cached_results, np.array(old, dtype=np.int64))
    return join_names([*(new_names[i] for i in new), *(old_names[row] for row in old)]), merged


def _write_cache(file: Path, names: str, results: ValidationResults, metadata: Mapping[str, str]) -> None:
    if not len(results):
        return
    try:
        write_results(file, names, results, metadata)
    except OSError as error:
        raise _unwritable(file.parent, error) from None


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache: the validation results cannot be written to {escape_unprintable(str(folder))} "
        f"({error.strerror}). Set data.cache (or $REGRAFT_CACHE) to a writable folder"
    )
