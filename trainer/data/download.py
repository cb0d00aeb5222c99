"""Download a dataset once, verify its SHA-1 and keep it extracted in the cache.

For the dataset `hotdog` the cache folder holds

    hotdog.zip          the verified archive; it may also be placed there by hand
    hotdog-fba480ff/    the extracted archive, complete or absent
    .hotdog.partial/    an unfinished download or extraction; the next start removes it
    .hotdog.lock        locked by the process that downloads and extracts
"""

import errno
import fcntl
import shutil
import stat
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import pooch

from trainer.errors import UserError
from trainer.text import escape_unprintable

TIMEOUT = 30.0
"""Seconds to wait for the connection and for each chunk of data."""
RETRIES = 2
"""Number of further attempts after a failed download."""
MAX_ENTRIES = 100_000
"""Largest number of entries in an archive that is extracted."""
MAX_EXTRACTED_BYTES = 4 * 2**30
"""Largest total size of the extracted files."""

OnProgress = Callable[[int, int | None], None]
"""Called with (bytes downloaded, total bytes or None)."""


@dataclass(frozen=True)
class RemoteDataset:
    """A zip archive of images on the web."""

    name: str
    url: str
    sha1: str
    """SHA-1 of the archive in hexadecimal."""
    folder: str
    """Folder in the archive that holds the dataset."""


def fetch_dataset(dataset: RemoteDataset, cache: Path, *, on_progress: OnProgress | None = None) -> Path:
    """Return the folder of a dataset; download and extract it first if the cache does not hold it.

    If several processes share a cache, one of them downloads and the others wait for it.

    Raises:
        UserError: no network, a wrong SHA-1, an unsafe archive, a full disk or an unusable cache.

    """
    extracted = cache / f"{dataset.name}-{dataset.sha1[:8]}"
    try:
        if not extracted.is_dir():
            cache.mkdir(parents=True, exist_ok=True)
            with (cache / f".{dataset.name}.lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX)
                if not extracted.is_dir():  # another process may have extracted it in the meantime
                    _download_and_extract(dataset, cache, extracted, on_progress or (lambda done, total: None))
    except OSError as error:
        raise cache_error(error, cache) from error
    return extracted / dataset.folder


def cache_error(error: OSError, cache: Path) -> UserError:
    """Return the error to raise if the cache folder cannot be read or written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        problem = f"no space is left in the cache {cache} ({error.strerror})"
    else:
        problem = f"the cache {cache} cannot be used ({error.strerror}: {error.filename or cache})"
    return UserError(
        f"{problem}.\nFree some space, fix the permissions or set data.cache (or $REGRAFT_CACHE) to another "
        "folder; then run the same command again"
    )


def extract_zip(archive: Path, folder: Path) -> None:
    """Extract a zip archive into a new folder; check all entries before the first is written.

    Raises:
        UserError: an unsafe or damaged archive.

    """
    try:
        with zipfile.ZipFile(archive) as opened:
            reason = _find_unsafe(opened.infolist())
            if reason:
                raise UserError(f"{archive} is not extracted: {reason}")
            opened.extractall(folder)  # never writes more than the sizes checked above
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, ValueError) as error:
        raise UserError(f"{archive} cannot be extracted: {escape_unprintable(str(error))}") from error


def _find_unsafe(entries: list[zipfile.ZipInfo]) -> str | None:
    """Return why an archive with these entries must not be extracted, or None if it is safe."""
    if len(entries) > MAX_ENTRIES:
        return f"it has {len(entries):,} entries; at most {MAX_ENTRIES:,} are allowed"
    total = sum(entry.file_size for entry in entries)
    if total > MAX_EXTRACTED_BYTES:
        return f"its files would take {total:,} bytes; at most {MAX_EXTRACTED_BYTES:,} are allowed"
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if path.is_absolute() or ".." in path.parts:
            return f"the path of its entry {entry.filename!r} leads out of the target folder"
        # The type is 0 if the archive was made on a system without Unix file types.
        if stat.S_IFMT(entry.external_attr >> 16) not in (0, stat.S_IFREG, stat.S_IFDIR):
            return f"its entry {entry.filename!r} is a link or a special file"
    return None


def _download_and_extract(dataset: RemoteDataset, cache: Path, extracted: Path, on_progress: OnProgress) -> None:
    """Create the folder `extracted`; work in a temporary folder, so that it is complete or absent."""
    archive = cache / f"{dataset.name}.zip"
    partial = cache / f".{dataset.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)  # left behind by a killed process
    partial.mkdir()
    try:
        if archive.exists():
            _check_sha1(dataset, archive)
        else:
            _download(dataset, archive, partial, on_progress)
        extract_zip(archive, partial / "extracted")
        if not (partial / "extracted" / dataset.folder).is_dir():
            raise UserError(f"{archive} has no folder {dataset.folder!r}")
        (partial / "extracted").rename(extracted)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _download(dataset: RemoteDataset, archive: Path, partial: Path, on_progress: OnProgress) -> None:
    """Download into the folder `partial`, verify the SHA-1 and move the file to `archive`."""

    def download(url: str, output: str, _: object) -> None:
        progress = _Progress(Path(output), on_progress)
        pooch.HTTPDownloader(progressbar=progress, chunk_size=2**16, timeout=TIMEOUT)(url, output, None)

    pooch.get_logger().setLevel("WARNING")  # its other lines would break into the progress display
    files = pooch.create(
        path=partial,
        base_url="",
        registry={archive.name: f"sha1:{dataset.sha1}"},
        urls={archive.name: dataset.url},
        retry_if_failed=RETRIES,
    )
    try:
        files.fetch(archive.name, downloader=download)
    except (OSError, ValueError) as error:  # ValueError: wrong SHA-1
        if isinstance(error, OSError) and error.errno is not None:
            raise  # an error of the disk; the errors of `requests` are OSErrors without a number
        raise UserError(
            f"the dataset {dataset.name!r} could not be downloaded from {dataset.url}: "
            f"{escape_unprintable(_reason(error))}.\n"
            f"Run the same command again; or place the file (SHA-1 {dataset.sha1}) at {archive} by hand; "
            "or set data.root to a folder of your own images"
        ) from error
    (partial / archive.name).rename(archive)


class _Progress:
    """Progress bar for pooch that reports the size of the file downloaded so far."""

    total = 0
    """Size from the Content-Length header [bytes]; 0 if unknown. Set by pooch."""

    def __init__(self, file: Path, on_progress: OnProgress) -> None:
        self._file, self._on_progress = file, on_progress

    def update(self, _: int) -> None:
        self._on_progress(self._file.stat().st_size, self.total or None)

    def reset(self) -> None: ...

    def close(self) -> None: ...


def _reason(error: BaseException) -> str:
    """Return the first sentence of the innermost cause; `requests` wraps it several times."""
    while error.__context__ is not None:
        error = error.__context__
    return str(error).partition(". ")[0] or type(error).__name__


def _check_sha1(dataset: RemoteDataset, archive: Path) -> None:
    """Raise a UserError if an archive placed by hand is another file; it is not deleted."""
    found = pooch.file_hash(archive, alg="sha1")
    if found != dataset.sha1:
        raise UserError(
            f"{archive} is not the dataset {dataset.name!r}: its SHA-1 is {found}, expected {dataset.sha1}.\n"
            f"Delete it to download it from {dataset.url}, or replace it by a complete copy of that file; "
            "then run the same command again"
        )
