"""Whether every image can be read: each is decoded once, and the verdict kept for the next start."""

# A Path for each of a million images takes longer than looking them up.
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

_AT_ONCE = 16  # images that a thread takes in hand


class ValidationResult(NamedTuple):
    """What was found, of which version of a file."""

    size: int
    """[bytes]."""
    mtime_ns: int
    reason: str | None
    """Why it cannot be read; None: it can."""


def check_images(
    paths: Iterable[str], *, cache: Path, workers: int, on_progress: Callable[[int, int], None] | None
) -> dict[str, str]:
    """Return path -> reason for each image that cannot be read.

    Verdicts are kept in `cache`/verdicts, in one file for each data set's folder, under the image's absolute
    path, size and time of change: only what is new or changed is decoded. Interrupted, it keeps what it has.

    Args:
        paths: the images.
        cache: folder to keep the verdicts in; made if need be.
        workers: threads that decode at once (Pillow lets go of Python's lock while it decodes).
        on_progress: called now and then with (images checked, images in all).

    Raises:
        UserError: the cache cannot be written to.

    """
    images = {path: os.path.abspath(path) for path in paths}
    if not images:
        return {}
    folder = _common_folder(images.values())
    file = cache / "verdicts" / f"{hashlib.sha256(os.fsencode(folder)).hexdigest()[:24]}.json"
    known = _read(file, folder)
    versions = {path: _version(path) for path in images}
    unreadable: dict[str, str] = {}
    waiting: list[str] = []
    for path, absolute in images.items():
        verdict = known.get(absolute[len(folder) :])
        if verdict is None or verdict[:2] != versions[path]:
            waiting.append(path)
        elif verdict.reason is not None:
            unreadable[path] = verdict.reason
    if not waiting:
        return unreadable
    _make_writable(file.parent)
    done = len(images) - len(waiting)
    with closing(_judged(waiting, workers)) as judged:
        try:
            for judgements in judged:
                for path, reason, lasting in judgements:
                    if reason is not None:
                        unreadable[path] = reason
                    version = versions[path]
                    if lasting and version is not None:
                        known[images[path][len(folder) :]] = ValidationResult(*version, reason)
                done += len(judgements)
                if on_progress is not None:
                    on_progress(done, len(images))
        finally:
            _write(file, folder, known, current={absolute[len(folder) :] for absolute in images.values()})
    return unreadable


def unreadable_error(unreadable: Mapping[str, str], total: int) -> UserError:
    """Return the error that lists all images that cannot be read (path -> reason), of `total` checked."""
    listed = "".join(
        f"\n  {escape_unprintable(path)}: {reason}" for path, reason in sorted(unreadable.items())
    )
    return UserError(
        f"{len(unreadable)} of {total} images cannot be read:{listed}\nMend, replace or remove them, or "
        "leave them out with --data.on_unreadable skip"
    )


def _common_folder(paths: Collection[str]) -> str:
    """Return the deepest folder that holds all these absolute paths, with its slash."""
    # What the first and the last have in common, all have.
    return os.path.commonprefix([min(paths), max(paths)]).rpartition("/")[0] + "/"  # noqa: RUF071


def _judged(paths: Sequence[str], workers: int) -> Generator[list[tuple[str, str | None, bool]], None, None]:
    """Yield, some at a time, (path, why it cannot be read or None, whether that is so for good)."""
    stop = threading.Event()

    def judge(start: int) -> list[tuple[str, str | None, bool]]:
        return [(path, *_reason(path)) for path in paths[start : start + _AT_ONCE] if not stop.is_set()]

    with ThreadPoolExecutor(max(1, workers), thread_name_prefix="check") as pool:
        try:
            yield from pool.map(judge, range(0, len(paths), _AT_ONCE))
        finally:
            stop.set()  # after Ctrl-C only the images in hand are decoded to their end


def _reason(path: str) -> tuple[str | None, bool]:
    try:
        decode(path)
    except UnreachableImage as error:
        return str(error), False
    except UnreadableImage as error:
        return str(error), True
    return None, True


def _version(path: str) -> tuple[int, int] | None:
    """Return a file's size [bytes] and time of change [ns]; None: it cannot be looked at."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns


def _make_writable(folder: Path) -> None:
    """Make the folder of verdicts, before the long work whose result it is to keep."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise _unwritable(folder, error) from None


def _read(file: Path, folder: str) -> dict[str, ValidationResult]:
    """Return name below `folder` -> verdict, as an earlier start left them; none, if they are of other rules.

    A damaged file counts as none and is written anew: it only saves work, and every image that it would
    have vouched for is decoded again.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["rules"] != _rules() or content["folder"] != folder:
            return {}
        return {name: _verdict(entry) for name, entry in content["images"].items()}
    except (OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError):
        return {}


def _verdict(entry: Any) -> ValidationResult:
    size, mtime_ns, reason = entry
    if type(size) is not int or type(mtime_ns) is not int or not isinstance(reason, str | None):
        raise TypeError(f"not a verdict: {entry!r}")
    return ValidationResult(size, mtime_ns, reason)


def _write(file: Path, folder: str, verdicts: Mapping[str, ValidationResult], *, current: Set[str]) -> None:
    """Write the verdicts; those of images that are not of this data set stay while their files do."""
    kept = {name: v for name, v in verdicts.items() if name in current or os.path.lexists(folder + name)}
    try:
        write_text_atomically(file, json.dumps({"rules": _rules(), "folder": folder, "images": kept}))
    except OSError as error:
        raise _unwritable(file.parent, error) from None


def _rules() -> str:
    """Return what a verdict depends on but for the file: under other rules it does not count."""
    return f"{DECODE_VERSION}, Pillow {PIL.__version__}"


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(
        f"data.cache: the verdicts on the images cannot be written to {escape_unprintable(str(folder))} "
        f"({error.strerror}). Set data.cache (or $REGRAFT_CACHE) to a folder that can be written to"
    )
