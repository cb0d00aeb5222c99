"""Data sets known by name: downloaded once, resumed, held to their SHA-1, unpacked, and kept in the cache.

For a data set `hotdog` the cache folder holds

    hotdog.zip          the archive, once its SHA-1 is right; kept. One put there by hand is taken as well
    hotdog.zip.part     what has come of it, and of which version: transfer.py
    hotdog-fba480ff/    the archive unpacked, whole or absent
    .hotdog.lock        held by the one process that downloads and unpacks; its death frees it
"""

import errno
import fcntl
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.filesize import decimal

from trainer.data.transfer import OnProgress, RemoteFile, TransferFailed, sha1_of, transfer
from trainer.data.unpack import is_whole, unpack_whole
from trainer.errors import UserError
from trainer.text import escape_unprintable

TIMEOUT = 30.0
"""Seconds to wait for a connection, and for each piece of the answer."""
PAUSE = 1.0
"""Seconds before the second try; doubled for each one after it."""


@dataclass(frozen=True)
class KnownDataset:
    """A zip archive of images on the web."""

    name: str
    url: str
    sha1: str
    size: int | None
    """Of the archive [bytes]; None: whatever the server announces."""
    folder: str
    """The folder in the archive that is the data set."""


KNOWN: dict[str, KnownDataset] = {
    dataset.name: dataset
    for dataset in (
        KnownDataset(
            name="hotdog",
            url="http://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip",
            sha1="fba480ffa8aa7e0febbb511d181409f899b9baa5",
            size=None,
            folder="hotdog",
        ),
    )
}


def fetch(
    dataset: KnownDataset,
    cache: Path,
    *,
    on_progress: OnProgress | None = None,
    timeout: float = TIMEOUT,
    pause: float = PAUSE,
) -> Path:
    """Return the folder of a data set: from the cache, else from the archive in it, else downloaded.

    Of several processes that share a cache one works, and the others wait for it. Whatever ends a download,
    the next call goes on from the bytes that have come.

    Args:
        dataset: what to fetch.
        cache: the folder of everything that is fetched; made if need be.
        on_progress: hears of a download, this process's or the one it waits for; not called without one.
        timeout: seconds to wait for a connection, and for each piece of the answer.
        pause: seconds before the second try; doubled for each one after it.

    Raises:
        UserError: no network, another file than expected, a hostile archive, no room, an unusable cache.

    """
    archive = RemoteFile(dataset.url, cache / f"{dataset.name}.zip", dataset.sha1, dataset.size)
    unpacked = cache / f"{dataset.name}-{dataset.sha1[:8]}"
    report = on_progress or (lambda done, total: None)
    try:
        if not is_whole(unpacked):
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(cache / f".{dataset.name}.lock", lambda: report(archive.came, dataset.size)):
                if not is_whole(unpacked):  # another process may have made it meanwhile
                    if not archive.path.exists():
                        transfer(archive, report, timeout=timeout, pause=pause)
                    _check_archive(dataset, archive.path)
                    archive.drop_part()  # of no use any more, where the archive was put there by hand
                    unpack_whole(archive.path, unpacked, holding=dataset.folder)
    except TransferFailed as error:
        raise _by_hand(dataset, archive, str(error)) from error
    except OSError as error:
        raise cache_error(error, cache) from error
    return unpacked / dataset.folder


def cache_error(error: OSError, cache: Path) -> UserError:
    """Return what to tell of a cache folder that cannot be written or read."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"there is no room left in the cache {cache} ({error.strerror}); what has come is kept"
    else:
        what = f"the cache {cache} cannot be used ({error.strerror}: {error.filename or cache})"
    return UserError(
        f"{what}.\nMake room or mend its permissions, or give data.cache (or $REGRAFT_CACHE) another folder; "
        "then run the same command again"
    )


@contextmanager
def _alone(lock: Path, waiting: Callable[[], None]) -> Iterator[None]:
    """Hold the lock file; `waiting` is called now and then while another process holds it."""
    with lock.open("ab") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                waiting()
                time.sleep(0.2)
        try:
            yield
        finally:
            fcntl.flock(file, fcntl.LOCK_UN)  # a forked child may still have the file open


def _by_hand(dataset: KnownDataset, archive: RemoteFile, trouble: str) -> UserError:
    """Return what to tell of a download that failed: why, and the ways on."""
    kept = f"\n{decimal(archive.came)} are kept: the next start goes on from there." if archive.came else ""
    return UserError(
        f"the data set {dataset.name!r} could not be downloaded: {escape_unprintable(trouble)}.{kept}\n"
        f"  from     {dataset.url}\n"
        f"  SHA-1    {dataset.sha1}\n"
        f"  by hand  put that file at {archive.path}, then run the same command again\n"
        f"  without  set data.root to a folder of images of your own"
    )


def _check_archive(dataset: KnownDataset, archive: Path) -> None:
    """Raise a UserError where the archive is another: one put there by hand is never deleted."""
    found = sha1_of(archive)
    if found != dataset.sha1:
        raise UserError(
            f"{archive} is not the data set {dataset.name!r}: "
            f"{archive.stat().st_size:,} bytes of SHA-1 {found}, expected {dataset.sha1}.\n"
            f"Delete it, and it is downloaded from {dataset.url}; or put that file there once more, "
            "whole; then run the same command again"
        )
