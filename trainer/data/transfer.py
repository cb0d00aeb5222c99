"""One file from the web, held to its SHA-1; whatever ends a transfer, the next goes on from what has come.

Beside `FILE`, which is whole or absent, stand meanwhile

    FILE.part           what has come of it
    FILE.part.version   of which version of the server's file
"""

import hashlib
import http.client
import itertools
import os
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.error import HTTPError, URLError

from trainer.data.unpack import require_room

OnProgress = Callable[[int, int | None], None]
"""Called with (bytes so far, bytes in all or None)."""

TRIES = 5
"""Failures in a row, without the file growing, after which it is given up."""
TRIES_OFFLINE = 2
"""The same where nothing has ever answered: without a network a person should not wait."""
GREATEST = 16 * 2**30
"""No known data set is larger [bytes]; an answer that goes on is endless."""
_CHUNK = 2**16


@dataclass(frozen=True)
class RemoteFile:
    """A file on the web, and where it comes to lie."""

    url: str
    path: Path
    sha1: str
    size: int | None
    """[bytes]; None: whatever the server announces."""

    @property
    def part(self) -> Path:
        """Return where it grows."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def version(self) -> Path:
        """Return where it stands which version of the server's file the part belongs to."""
        return self.path.with_name(f"{self.path.name}.part.version")

    @property
    def came(self) -> int:
        """Return how many bytes have been transferred."""
        for path in (self.part, self.path):
            with suppress(FileNotFoundError):
                return path.stat().st_size
        return 0

    def drop_part(self) -> None:
        """Begin again from nothing."""
        self.part.unlink(missing_ok=True)
        self.version.unlink(missing_ok=True)


class TransferFailed(Exception):
    """Why the file does not come, where another try would meet the same; some are words of the server."""


class _Interrupted(Exception):
    """What another try may mend."""


class _Unreachable(_Interrupted):
    """No connection."""


def transfer(wanted: RemoteFile, report: OnProgress, *, timeout: float, pause: float) -> None:
    """Bring the file into place, whole and with the right SHA-1; one process at a time.

    Args:
        wanted: what to bring, and where to.
        report: hears of each piece.
        timeout: seconds to wait for a connection, and for each piece of the answer.
        pause: seconds before the second try; doubled for each one after it.

    Raises:
        TransferFailed: no network, another file than expected; what has come of the right one is kept.
        OSError: the disk is full or cannot be written; what has come is kept.

    """
    opener = _opener()
    at_first = furthest = wanted.came
    failures, once_more = 0, True
    while True:
        resumed = wanted.came > 0
        # All of it may be there: after a kill just before the end, or where more was announced than there is.
        if resumed and sha1_of(wanted.part) == wanted.sha1:
            break
        try:
            report(wanted.came, wanted.size)
            answer = _receive(wanted, opener, report, timeout)
        except _Interrupted as trouble:
            failures = 1 if wanted.came >= furthest + _CHUNK else failures + 1
            furthest = max(furthest, wanted.came)
            offline = isinstance(trouble, _Unreachable) and furthest == at_first
            if failures >= (TRIES_OFFLINE if offline else TRIES):
                raise TransferFailed(f"{trouble} ({failures} times in a row)") from trouble
            time.sleep(pause * 2 ** (failures - 1))
            continue
        found = sha1_of(wanted.part)
        if found == wanted.sha1:
            break
        another = f"another file came than expected, {wanted.came:,} bytes of SHA-1 {found} ({answer.kind})"
        wanted.drop_part()
        if not once_more or (answer.announced and not resumed):
            raise TransferFailed(another)
        # Put together from several answers, or cut short without a sign: once more, in one.
        once_more, failures, furthest = False, 0, 0
    with wanted.part.open("rb") as file:
        os.fsync(file.fileno())
    wanted.part.rename(wanted.path)
    wanted.version.unlink(missing_ok=True)


def sha1_of(path: Path) -> str:
    """Return the SHA-1 of a file in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.sha1(usedforsecurity=False)).hexdigest()


@dataclass(frozen=True)
class _Answer:
    """What the server has said of the file."""

    announced: bool
    """It told the length, so a shorter file has been noticed."""
    kind: str
    """Its content type."""


def _receive(
    wanted: RemoteFile, opener: urllib.request.OpenerDirector, report: OnProgress, timeout: float
) -> _Answer:
    """Add one answer of the server to what has come.

    Raises:
        _Interrupted: it ended early; what has come is kept.
        TransferFailed: it is not the file, and what came before is left alone.

    """
    with _ask(wanted, opener, timeout) as response:
        start, total = _extent(response, wanted)
        kind = f"content type {response.headers.get('Content-Type', 'not given')}"
        pieces = _pieces(response, timeout)
        first = next(pieces, b"")
        text = first.lstrip(b"\xef\xbb\xbf \t\r\n")
        if start == 0 and text.startswith(b"<"):
            raise TransferFailed(
                f"instead of the archive {response.url} sends a web page ({kind}), as a login or a proxy "
                f"does: {text[:60].decode('utf-8', 'replace')!r}"
            )
        if total is not None and total != (wanted.size or total):
            raise TransferFailed(
                f"another file is offered, of {total:,} bytes ({kind}); expected {wanted.size:,}"
            )
        expected = total or wanted.size
        greatest = expected or GREATEST
        if greatest > GREATEST:
            raise TransferFailed(
                f"a file of {greatest:,} bytes is offered ({kind}), larger than any known data set"
            )
        require_room(wanted.part.parent, (expected or 0) - start)
        if start == 0:
            wanted.version.write_text(_version(response), encoding="utf-8")
        came = start
        with wanted.part.open("r+b" if start else "wb") as file:
            file.seek(start)
            for piece in itertools.chain((first,), pieces):
                came += len(piece)
                if came > greatest:
                    break
                file.write(piece)
                file.flush()  # a kill loses nothing of it
                report(came, expected)
    if came > greatest:
        wanted.drop_part()
        raise TransferFailed(f"the answer does not end: more than {greatest:,} bytes came ({kind})")
    if came < (expected or 0):
        raise _Interrupted(f"the connection ended after {came:,} of {expected:,} bytes")
    return _Answer(total is not None, kind)


def _ask(
    wanted: RemoteFile, opener: urllib.request.OpenerDirector, timeout: float
) -> http.client.HTTPResponse:
    """Return the server's answer to the request for what is missing."""
    request = urllib.request.Request(wanted.url, headers={"User-Agent": "regraft"})  # noqa: S310 (_opener)
    if wanted.came:
        request.add_header("Range", f"bytes={wanted.came}-")
        version = _version_of_part(wanted)
        if version:  # where the server's file is another by now, it sends all of it
            request.add_header("If-Range", version)
    try:
        response: http.client.HTTPResponse = opener.open(request, timeout=timeout)
    except HTTPError as error:
        error.close()
        answer = f"the server answers {error.code} {error.reason}"
        if error.code == 416 and wanted.came:  # more has come than there is
            wanted.drop_part()
        elif error.code < 500 and error.code not in (408, 425, 429):
            raise TransferFailed(answer) from error
        raise _Interrupted(answer) from error
    except URLError as error:
        raise _Unreachable(_reason(error, timeout)) from error
    except (OSError, http.client.HTTPException, ValueError) as error:  # ValueError: a redirection to nonsense
        raise _Interrupted(_reason(error, timeout)) from error
    return response


def _extent(response: http.client.HTTPResponse, wanted: RemoteFile) -> tuple[int, int | None]:
    """Return where in the file the answer begins, and the length of the whole file or None."""
    if response.status == 200:
        return 0, response.length
    if response.status != 206:
        raise TransferFailed(f"the server answers {response.status} {response.reason}")
    given = response.headers.get("Content-Range", "none")
    found = re.fullmatch(r"bytes (\d{1,18})-\d{1,18}/(\d{1,18}|\*)", given)
    if found is None or int(found[1]) != wanted.came:
        asked = wanted.came
        wanted.drop_part()
        raise _Interrupted(
            f"the server sends other bytes than those from {asked:,} on (Content-Range: {given})"
        )
    return wanted.came, None if found[2] == "*" else int(found[2])


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


def _version_of_part(wanted: RemoteFile) -> str:
    """Return the version that the part belongs to, or nothing: none was given, or none that fits a header."""
    try:
        version = wanted.version.read_text(encoding="ascii")
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
