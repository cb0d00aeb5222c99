"""Data sets known by name: downloaded once, resumed, held to their SHA-1, unpacked, and kept in the cache.

For a data set `hotdog` the cache folder holds

    hotdog.zip          the archive, once its SHA-1 is right; kept. One put there by hand is taken as well
    hotdog.zip.part     what has come of it; hotdog.zip.part.version: of which version of the server's file
    hotdog-fba480ff/    the archive unpacked, whole or absent
    .hotdog.lock        held by the one process that downloads and unpacks; its death frees it
"""

import errno
import fcntl
import hashlib
import http.client
import itertools
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

from rich.console import Console
from rich.filesize import decimal
from rich.progress import (
    BarColumn,
    DownloadColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.progress import Progress as Bar

from trainer.data.unpack import is_whole, require_room, unpack_whole
from trainer.errors import UserError

OnProgress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None)."""

TIMEOUT = 30.0
"""Seconds to wait for a connection, and for each piece of the answer."""
PAUSE = 1.0
"""Seconds before the second try; doubled for each one after it."""
TRIES = 5
"""Failures in a row, without the file growing, after which it is given up."""
TRIES_OFFLINE = 2
"""The same where nothing has ever answered: without a network a person should not wait."""
GREATEST = 16 * 2**30
"""No known data set is larger [bytes]; an answer that goes on is endless."""
_CHUNK = 2**16


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


class _Places:
    """Where everything of a data set lies in the cache."""

    def __init__(self, dataset: KnownDataset, cache: Path) -> None:
        self.dataset = dataset
        self.archive = cache / f"{dataset.name}.zip"
        self.part = cache / f"{dataset.name}.zip.part"
        self.version = cache / f"{dataset.name}.zip.part.version"
        self.lock = cache / f".{dataset.name}.lock"
        self.unpacked = cache / f"{dataset.name}-{dataset.sha1[:8]}"

    @property
    def came(self) -> int:
        """Return how many bytes have been downloaded."""
        for path in (self.part, self.archive):
            with suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

    def drop_part(self) -> None:
        """Begin again from nothing."""
        self.part.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)


class _Interrupted(Exception):
    """What another try may mend."""


class _Unreachable(_Interrupted):
    """No connection."""


class _Refused(Exception):
    """What another try would meet again."""


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
    places = _Places(dataset, cache)
    report = on_progress or (lambda done, total: None)
    try:
        if not is_whole(places.unpacked):
            cache.mkdir(parents=True, exist_ok=True)
            with _alone(places.lock, lambda: report(places.came, dataset.size)):
                if not is_whole(places.unpacked):  # another process may have made it meanwhile
                    if not places.archive.exists():
                        _download(places, report, timeout=timeout, pause=pause)
                    _check_archive(places)
                    places.drop_part()  # of no use any more, where the archive was put there by hand
                    unpack_whole(places.archive, places.unpacked, holding=dataset.folder)
    except OSError as error:
        raise cache_error(error, cache) from error
    return places.unpacked / dataset.folder


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


def _download(places: _Places, report: OnProgress, *, timeout: float, pause: float) -> None:
    """Bring the archive into place, whole and with the right SHA-1."""
    sha1 = places.dataset.sha1
    opener = _opener()
    at_first = furthest = places.came
    failures, once_more = 0, True
    while True:
        resumed = places.came > 0
        # All of it may be there: after a kill just before the end, or where more was announced than there is.
        if resumed and _sha1(places.part) == sha1:
            break
        try:
            report(places.came, places.dataset.size)
            answer = _receive(places, opener, report, timeout)
        except _Refused as trouble:
            raise _by_hand(places, str(trouble)) from trouble
        except _Interrupted as trouble:
            failures = 1 if places.came >= furthest + _CHUNK else failures + 1
            furthest = max(furthest, places.came)
            offline = isinstance(trouble, _Unreachable) and furthest == at_first
            if failures >= (TRIES_OFFLINE if offline else TRIES):
                raise _by_hand(places, f"{trouble} ({failures} times in a row)") from trouble
            time.sleep(pause * 2 ** (failures - 1))
            continue
        found = _sha1(places.part)
        if found == sha1:
            break
        another = f"another file came than expected, {places.came:,} bytes of SHA-1 {found} ({answer.kind})"
        places.drop_part()
        if not once_more or (answer.announced and not resumed):
            raise _by_hand(places, another)
        # Put together from several answers, or cut short without a sign: once more, in one.
        once_more, failures, furthest = False, 0, 0
    with places.part.open("rb") as file:
        os.fsync(file.fileno())
    places.part.rename(places.archive)


@dataclass(frozen=True)
class _Answer:
    """What the server has said of the file."""

    announced: bool
    """It told the length, so a shorter file has been noticed."""
    kind: str
    """Its content type."""


def _receive(
    places: _Places, opener: urllib.request.OpenerDirector, report: OnProgress, timeout: float
) -> _Answer:
    """Add one answer of the server to what has come.

    Raises:
        _Interrupted: it ended early; what has come is kept.
        _Refused: it is not the file, and what came before is left alone.

    """
    size = places.dataset.size
    with _ask(places, opener, timeout) as response:
        start, total = _extent(response, places)
        kind = f"content type {response.headers.get('Content-Type', 'not given')}"
        pieces = _pieces(response, timeout)
        first = next(pieces, b"")
        text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
        if start == 0 and text.startswith(b"<"):
            raise _Refused(
                f"instead of the archive {response.url} sends a web page ({kind}), as a login or a proxy "
                f"does: {text[:60].decode('utf-8', 'replace')!r}"
            )
        if total is not None and total != (size or total):
            raise _Refused(f"another file is offered, of {total:,} bytes ({kind}); expected {size:,}")
        expected = total or size
        greatest = expected or GREATEST
        if greatest > GREATEST:
            raise _Refused(
                f"a file of {greatest:,} bytes is offered ({kind}), larger than any known data set"
            )
        require_room(places.part.parent, (expected or 0) - start)
        if start == 0:
            places.version.write_text(_version(response), encoding="utf-8")
        came = start
        with places.part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for piece in itertools.chain((first,), pieces):
                came += len(piece)
                if came > greatest:
                    break
                file.write(piece)
                file.flush()  # a kill loses nothing of it
                report(came, expected)
    if came > greatest:
        places.drop_part()
        raise _Refused(f"the answer does not end: more than {greatest:,} bytes came ({kind})")
    if came < (expected or 0):
        raise _Interrupted(f"the connection ended after {came:,} of {expected:,} bytes")
    return _Answer(total is not None, kind)


def _ask(places: _Places, opener: urllib.request.OpenerDirector, timeout: float) -> http.client.HTTPResponse:
    """Return the server's answer to the request for what is missing."""
    request = urllib.request.Request(places.dataset.url, headers={"User-Agent": "regraft"})  # noqa: S310 (_opener)
    if places.came:
        request.add_header("Range", f"bytes={places.came}-")
        version = _version_of_part(places)
        if version:  # where the server's file is another by now, it sends all of it
            request.add_header("If-Range", version)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == 416 and places.came:  # more has come than there is
            places.drop_part()
        elif error.code < 500 and error.code not in (408, 425, 429):
            raise _Refused(answer) from error
        raise _Interrupted(answer) from error
    except URLError as error:
        raise _Unreachable(_reason(error, timeout)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a redirection to nonsense
        raise _Interrupted(_reason(error, timeout)) from error
    return response


def _extent(response: http.client.HTTPResponse, places: _Places) -> tuple[int, int | None]:
    """Return where in the file the answer begins, and the length of the whole file or None."""
    if response.status == 200:
        return 0, response.length
    if response.status != 206:
        raise _Refused(f"the server answers {response.status} {response.reason}")
    given = response.headers.get("Content-Range", "none")
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", given)
    if found is None or int(found[1]) != places.came:
        asked = places.came
        places.drop_part()
        raise _Interrupted(
            f"the server sends other bytes than those from {asked:,} on (Content-Range: {given})"
        )
    return places.came, None if found[2] == "*" else int(found[2])


def _pieces(response: http.client.HTTPResponse, timeout: float) -> Iterator[bytes]:
    """Yield what comes as it comes, and no more than the answer has announced."""
    while True:
        try:
            piece = response.read1(_CHUNK)
        except (OSError, http.client.HTTPException) as error:
            raise _Interrupted(_reason(error, timeout)) from error
        if not piece:
            return
        yield piece


def _version(response: http.client.HTTPResponse) -> str:
    """Return what If-Range needs: a strong ETag, or a date, or nothing."""
    tag = response.headers.get("ETag", "")
    version: str = tag if tag.startswith('"') else response.headers.get("Last-Modified", "")
    return version


def _version_of_part(places: _Places) -> str:
    """Return the version that the part belongs to, or nothing: none was given, or none that fits a header."""
    try:
        version = places.version.read_text(encoding="ascii")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    return version if version.isprintable() else ""


def _opener() -> urllib.request.OpenerDirector:
    """Return an opener of http and https, and the environment's proxies; urllib's own opens files too."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPRedirectHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.UnknownHandler(),
    ):
        opener.add_handler(handler)
    return opener


def _reason(error: Exception, timeout: float) -> str:
    """Return in a few words why there is no answer, or no more of it."""
    inner = error.reason if isinstance(error, URLError) else error
    if isinstance(inner, TimeoutError):
        return f"nothing came for {timeout:g} s"
    if isinstance(inner, http.client.IncompleteRead):
        return "the connection ended in the middle"
    return (isinstance(inner, OSError) and inner.strerror) or str(inner) or type(inner).__name__


def _by_hand(places: _Places, trouble: str) -> UserError:
    """Return what to tell of a download that failed: why, and the ways on."""
    # Some of it are the server's words: they must not steer the terminal.
    plain = "".join(character if character.isprintable() else "?" for character in trouble)
    kept = f"\n{decimal(places.came)} are kept: the next start goes on from there." if places.came else ""
    return UserError(
        f"the data set {places.dataset.name!r} could not be downloaded: {plain}.{kept}\n"
        f"  from     {places.dataset.url}\n"
        f"  SHA-1    {places.dataset.sha1}\n"
        f"  by hand  put that file at {places.archive}, then run the same command again\n"
        f"  without  set data.root to a folder of images of your own"
    )


def _sha1(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()


def _check_archive(places: _Places) -> None:
    """Raise a UserError where the archive is another: one put there by hand is never deleted."""
    found = _sha1(places.archive)
    if found != places.dataset.sha1:
        raise UserError(
            f"{places.archive} is not the data set {places.dataset.name!r}: "
            f"{places.archive.stat().st_size:,} bytes of SHA-1 {found}, expected {places.dataset.sha1}.\n"
            f"Delete it, and it is downloaded from {places.dataset.url}; or put that file there once more, "
            "whole; then run the same command again"
        )


@contextmanager
def progress_bar(title: str, *, console: Console | None = None) -> Iterator[OnProgress]:
    """Yield what `fetch` reports to: a bar on a terminal, else a line for each tenth.

    Nothing is seen until the first report: a data set in the cache has none.
    """
    console = console or Console(highlight=False, markup=False, emoji=False, soft_wrap=True)
    if not console.is_terminal:
        yield _plain_lines(title, console)
        return
    bar = Bar(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        DownloadColumn(),
        TransferSpeedColumn(),
        TextColumn("ETA"),
        TimeRemainingColumn(compact=True),
        console=console,
        transient=True,
    )
    task: TaskID | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal task
        if task is None:
            bar.start()
            task = bar.add_task(title, completed=done, total=total)
        bar.update(task, completed=done, total=total)

    try:
        yield show
    finally:
        if task is not None:
            bar.stop()
    if task is not None:
        seen = bar.tasks[0]
        console.print(f"{title}: {decimal(int(seen.completed))} in {seen.elapsed or 0:.0f} s")


def _plain_lines(title: str, console: Console) -> OnProgress:
    said = -1
    in_all: int | None = None

    def show(done: int, total: int | None) -> None:
        nonlocal said, in_all
        in_all = total or in_all
        mark = done * 10 // in_all if in_all else done // 50_000_000
        if mark != said:
            console.print(f"{title}: " + (f"{mark * 10} % of {decimal(in_all)}" if in_all else decimal(done)))
            said = mark

    return show
