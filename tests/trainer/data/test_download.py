"""Against real HTTP servers on loopback that truncate, lie, stall and reset."""

import errno
import hashlib
import http.server
import io
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from trainer.data import download, unpack
from trainer.data.download import KNOWN, KnownDataset, fetch, progress_bar
from trainer.errors import UserError

PICTURE = os.urandom(400_000)


def _archive() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("set/train/hot/1.jpg", PICTURE)
        archive.writestr("set/test/cold/2.jpg", b"cold")
    return buffer.getvalue()


DATA = _archive()
SHA1 = hashlib.sha1(DATA).hexdigest()
HALF = len(DATA) // 2

Answer = Callable[["Handler"], object]


class Handler(http.server.BaseHTTPRequestHandler):
    """One request: it is answered by the next of the server's answers; the last one is used ever after."""

    server: "Server"

    def do_GET(self) -> None:
        with self.server.turn:
            self.server.asked.append(self.headers.get("Range"))
            self.server.if_range.append(self.headers.get("If-Range"))
            answer = self.server.answers[min(len(self.server.asked), len(self.server.answers)) - 1]
        with suppress(ConnectionError):  # the client has seen enough
            answer(self)

    def log_message(self, format: str, *args: object) -> None:
        pass

    def head(self, status: int, **headers: object) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def body(self, data: bytes, *, piece: int = 20_000, pause: float = 0) -> None:
        for i in range(0, len(data), piece):
            self.wfile.write(data[i : i + piece])
            self.server.sent += len(data[i : i + piece])
            time.sleep(pause)

    @property
    def offset(self) -> int:
        found = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or "")
        return int(found[1]) if found else 0


class Server(http.server.ThreadingHTTPServer):
    """What was asked of it, and what it answers."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str | None] = []
        self.if_range: list[str | None] = []
        self.answers: list[Answer] = []
        self.sent = 0
        self.turn = threading.Lock()
        self.over = threading.Event()
        """Set at the end: what waits on it has stalled for as long as the test."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/set.zip"

    def handle_error(self, request: object, client_address: object) -> None:
        pass


def whole(handler: Handler) -> None:
    """Ignore Range, as simple servers do."""
    handler.head(200, Content_Length=len(DATA), Content_Type="application/zip")
    handler.body(DATA)


def ranges(
    handler: Handler, data: bytes = DATA, tag: str = '"1"', upto: int | None = None, pause: float = 0
) -> None:
    """Serve as S3 does; cut off after byte `upto`."""
    offset = handler.offset if handler.headers.get("If-Range") in (None, tag) else 0
    if offset >= len(data):
        handler.head(416, Content_Range=f"bytes */{len(data)}", Content_Length=0)
        return
    given = {"Content_Range": f"bytes {offset}-{len(data) - 1}/{len(data)}"} if offset else {}
    handler.head(206 if offset else 200, Content_Length=len(data) - offset, ETag=tag, **given)
    handler.body(data[offset:upto], pause=pause)


def cut(upto: int) -> Answer:
    return lambda handler: ranges(handler, upto=upto)


def cut_whole(handler: Handler) -> None:
    handler.head(200, Content_Length=len(DATA))
    handler.body(DATA[:HALF])


def unannounced(handler: Handler, upto: int | None = None) -> None:
    """End the body by closing the connection, as HTTP/1.0 servers may."""
    handler.head(200)
    handler.body(DATA[:upto])


def chunked(handler: Handler, upto: int | None = None) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.close_connection = True
    handler.head(200, Transfer_Encoding="chunked", Connection="close")
    for i in range(0, len(DATA[:upto]), 50_000):
        piece = DATA[i : i + 50_000]
        handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
    if upto is None:
        handler.wfile.write(b"0\r\n\r\n")


def stalled(handler: Handler) -> None:
    ranges(handler, upto=HALF)
    handler.server.over.wait(20)


def silent(handler: Handler) -> None:
    handler.server.over.wait(20)


def reset(handler: Handler) -> None:
    ranges(handler, upto=HALF)
    time.sleep(0.3)  # else the reset overtakes what was sent
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.wfile.close()
    handler.rfile.close()
    handler.connection.close()


def hung_up(handler: Handler) -> None:
    """Close without a word."""


def announcing(length: int, data: bytes = DATA) -> Answer:
    def answer(handler: Handler) -> None:
        handler.head(200, Content_Length=length)
        handler.body(data)

    return answer


def status(code: int, **headers: object) -> Answer:
    return lambda handler: handler.head(code, **headers)


def endless(handler: Handler) -> None:
    handler.head(200)
    while not handler.server.over.is_set():
        handler.body(bytes(100_000))


def page(handler: Handler) -> None:
    text = b"\n <!DOCTYPE html><title>Please log in\x1b[2J</title>"
    handler.head(200, Content_Length=len(text), Content_Type="text/html; charset=utf-8\x1b[2J")
    handler.body(text)


def partial(content_range: str) -> Answer:
    return lambda handler: (handler.head(206, Content_Range=content_range), handler.body(DATA[HALF:]))


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield running
        running.over.set()
        running.shutdown()
        thread.join()


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache folder" / "regraft"


def dataset(server: Server, **changes: Any) -> KnownDataset:
    return replace(KnownDataset(name="set", url=server.url, sha1=SHA1, size=None, folder="set"), **changes)


def get(wanted: KnownDataset, cache: Path, **options: Any) -> Path:
    return fetch(wanted, cache, **{"timeout": 1.0, "pause": 0.01, **options})


def holds_the_pictures(folder: Path, cache: Path) -> bool:
    whole = (folder / "train/hot/1.jpg").read_bytes() == PICTURE and (folder / "test/cold/2.jpg").exists()
    names = {p.name for p in cache.iterdir()}
    return whole and names == {"set.zip", f"set-{SHA1[:8]}", ".set.lock"}


def error_of(wanted: KnownDataset, cache: Path, **options: Any) -> str:
    with pytest.raises(UserError) as caught:
        get(wanted, cache, **options)
    return str(caught.value)


def with_part(cache: Path, content: bytes, version: str = "") -> Path:
    cache.mkdir(parents=True)
    (cache / "set.zip.part.version").write_text(version)
    part = cache / "set.zip.part"
    part.write_bytes(content)
    return part


# --- the usual way


@pytest.mark.parametrize("answer", [whole, ranges, unannounced, chunked])
def test_it_is_downloaded_unpacked_and_from_then_on_cached(
    answer: Answer, server: Server, cache: Path
) -> None:
    server.answers = [answer]
    seen: list[tuple[int, int | None]] = []
    folder = get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total)))
    assert holds_the_pictures(folder, cache)
    known = None if answer in (unannounced, chunked) else len(DATA)
    assert (seen[0], seen[-1]) == ((0, None), (len(DATA), known))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    seen.clear()
    assert get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total))) == folder
    assert (len(server.asked), seen) == (1, [])


def test_the_archive_is_kept_and_unpacked_again_without_the_network(server: Server, cache: Path) -> None:
    server.answers = [ranges]
    folder = get(dataset(server), cache)
    unpack.shutil.rmtree(folder.parent)
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert len(server.asked) == 1


def test_an_archive_put_there_by_hand_is_used_without_the_network(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    (cache / "set.zip").write_bytes(DATA)
    folder = get(
        dataset(server), cache, on_progress=lambda done, total: pytest.fail("no download, no progress")
    )
    assert holds_the_pictures(folder, cache)
    assert server.asked == []


def test_a_wrong_archive_put_there_by_hand_is_named_and_left_alone(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    (cache / "set.zip").write_bytes(DATA[:-1])
    text = error_of(dataset(server), cache)
    found = hashlib.sha1(DATA[:-1]).hexdigest()
    assert all(
        word in text for word in (str(cache / "set.zip"), found, SHA1, server.url, f"{len(DATA) - 1:,} bytes")
    )
    assert (cache / "set.zip").read_bytes() == DATA[:-1]
    assert server.asked == []


def test_the_hotdogs_are_those_of_the_recipe() -> None:
    hotdog = KNOWN["hotdog"]
    assert hotdog.url == "http://d2l-data.s3-accelerate.amazonaws.com/hotdog.zip"
    assert hotdog.sha1 == "fba480ffa8aa7e0febbb511d181409f899b9baa5"
    assert (hotdog.name, hotdog.folder) == ("hotdog", "hotdog")


# --- interruptions


@pytest.mark.parametrize("interruption", [cut(HALF), stalled, reset])
def test_an_interrupted_download_goes_on_where_it_stopped(
    interruption: Answer, server: Server, cache: Path
) -> None:
    server.answers = [interruption, ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [None, f"bytes={HALF}-"]
    assert server.if_range == [None, '"1"']
    assert server.sent == len(DATA)


@pytest.mark.parametrize("trouble", [silent, hung_up, status(500), status(503), status(429)])
def test_what_may_pass_is_tried_again(trouble: Answer, server: Server, cache: Path) -> None:
    server.answers = [trouble, trouble, ranges]
    assert holds_the_pictures(get(dataset(server), cache, timeout=0.5), cache)
    assert len(server.asked) == 3


def test_a_server_that_truncates_always_is_read_to_the_end_as_long_as_the_file_grows(
    server: Server, cache: Path
) -> None:
    server.answers = [lambda handler: ranges(handler, upto=handler.offset + 70_000)]
    server.answers += [hung_up, hung_up] + server.answers * 10
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.sent == len(DATA)


def test_a_server_that_truncates_always_and_knows_no_range_is_given_up(server: Server, cache: Path) -> None:
    server.answers = [cut_whole]
    text = error_of(dataset(server), cache)
    assert f"the connection ended after {HALF:,} of {len(DATA):,} bytes" in text
    assert "are kept" in text
    assert len(server.asked) == download.TRIES
    assert (cache / "set.zip.part").read_bytes() == DATA[:HALF]


def test_a_server_without_ranges_sends_it_all_again(server: Server, cache: Path) -> None:
    server.answers = [cut_whole, whole]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [None, f"bytes={HALF}-"]


def test_a_file_that_has_changed_on_the_server_is_not_mixed_with_the_old_one(
    server: Server, cache: Path
) -> None:
    with_part(cache, b"old" * 1000, '"0"')
    server.answers = [ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.if_range == ['"0"']
    assert server.sent == len(DATA)


def test_a_weak_tag_does_not_tell_versions_apart_but_the_date_does(server: Server, cache: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"

    def dated(handler: Handler) -> None:
        handler.head(200, Content_Length=len(DATA), ETag='W/"1"', Last_Modified=date)
        handler.body(DATA[:HALF])

    server.answers = [dated, lambda handler: ranges(handler, tag=date)]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.if_range == [None, date]
    assert server.sent == len(DATA)


def test_a_resumed_file_with_a_wrong_hash_is_downloaded_once_more_from_zero(
    server: Server, cache: Path
) -> None:
    with_part(cache, b"x" * 1000)
    server.answers = [ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize("answer", [unannounced, chunked])
def test_a_body_of_unannounced_length_that_is_cut_is_noticed(
    answer: Callable[..., None], known: bool, server: Server, cache: Path
) -> None:
    server.answers = [lambda handler: answer(handler, upto=100_000), ranges]
    wanted = dataset(server, size=len(DATA) if known else None)
    assert holds_the_pictures(get(wanted, cache), cache)
    resumed = known or answer is chunked
    assert server.asked == [None, "bytes=100000-" if resumed else None]


def test_a_part_that_is_all_of_it_needs_no_network(server: Server, cache: Path) -> None:
    with_part(cache, DATA)
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == []


def test_a_part_with_more_than_the_file_begins_again(server: Server, cache: Path) -> None:
    with_part(cache, DATA + b"more")
    server.answers = [ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [f"bytes={len(DATA) + 4}-", None]


@pytest.mark.parametrize("version", ["图", '"1"\r\nEvil: 1'])
def test_a_damaged_version_file_is_not_sent(version: str, server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF], version)
    server.answers = [ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert (server.asked, server.if_range) == ([f"bytes={HALF}-"], [None])


@pytest.mark.parametrize(
    "given",
    [f"bytes 0-{HALF}/{len(DATA)}", f"bytes {HALF + 1}-{len(DATA) - 1}/{len(DATA)}", "bytes */5", "x"],
)
def test_a_wrong_content_range_begins_again(given: str, server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    server.answers = [partial(given), ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [f"bytes={HALF}-", None]


def test_a_range_to_an_unknown_end_is_taken(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF])
    server.answers = [partial(f"bytes {HALF}-{len(DATA) - 1}/*")]
    assert holds_the_pictures(get(dataset(server), cache), cache)


@pytest.mark.parametrize("seed", [random.randrange(2**32)])
def test_whatever_a_server_does_the_right_file_comes_out_or_none(
    seed: int, server: Server, tmp_path: Path
) -> None:
    print("seed", seed)
    dice = random.Random(seed)
    kinds = [whole, ranges, chunked, unannounced, reset, hung_up, status(500), cut_whole, status(416), page]
    kinds += [partial("bytes 0-9/10"), announcing(HALF), announcing(len(DATA) + 9)]
    for i in range(12):
        cuts = [cut(dice.randrange(len(DATA))) for _ in range(3)]
        server.asked.clear()
        server.answers = [dice.choice(kinds + cuts) for _ in range(dice.randint(1, 6))] + [ranges]
        for _ in range(10):
            with suppress(UserError):
                assert holds_the_pictures(get(dataset(server), tmp_path / str(i)), tmp_path / str(i))
                break
        else:
            pytest.fail("the last answer is right, and was not reached")


# --- lies


def test_more_announced_than_there_is(server: Server, cache: Path) -> None:
    server.answers = [announcing(len(DATA) + 100)]
    assert holds_the_pictures(get(dataset(server), cache), cache), "all of it has come, by its SHA-1"
    assert len(server.asked) == 1


def test_less_announced_than_there_is(server: Server, cache: Path) -> None:
    server.answers = [announcing(HALF)]
    text = error_of(dataset(server), cache)
    assert f"{HALF:,} bytes of SHA-1 {hashlib.sha1(DATA[:HALF]).hexdigest()}" in text
    assert not (cache / "set.zip.part").exists()


def test_another_file_is_refused_with_both_hashes(server: Server, cache: Path) -> None:
    other = b"PK" + os.urandom(1000)
    server.answers = [lambda handler: ranges(handler, data=other)]
    text = error_of(dataset(server), cache)
    assert "another file came than expected, 1,002 bytes" in text
    assert hashlib.sha1(other).hexdigest() in text
    assert SHA1 in text
    assert [p.name for p in cache.iterdir()] == [".set.lock"]
    assert len(server.asked) == 1, "it came whole, so another try would bring the same"


def test_a_file_of_another_size_than_known_is_refused_before_it_is_downloaded(
    server: Server, cache: Path
) -> None:
    part = with_part(cache, DATA[:1000])
    server.answers = [whole]
    text = error_of(dataset(server, size=len(DATA) + 1), cache)
    assert f"of {len(DATA):,} bytes (content type application/zip); expected {len(DATA) + 1:,}" in text
    assert part.read_bytes() == DATA[:1000]


def test_a_login_page_is_shown_for_what_it_is_and_does_not_cost_what_has_come(
    server: Server, cache: Path
) -> None:
    part = with_part(cache, DATA[:HALF])
    server.answers = [page]
    text = error_of(dataset(server), cache)
    assert "sends a web page (content type text/html; charset=utf-8?[2J)" in text
    assert "<!DOCTYPE html><title>Please log in" in text
    assert "\x1b" not in text
    assert part.read_bytes() == DATA[:HALF]
    server.answers = [ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_an_endless_body_ends(
    known: bool, server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(download, "GREATEST", 2_000_000)
    server.answers = [endless]
    text = error_of(dataset(server, size=len(DATA) if known else None), cache)
    assert f"does not end: more than {len(DATA) if known else 2_000_000:,} bytes came" in text
    assert not (cache / "set.zip.part").exists()


def test_a_preposterous_size_is_refused(server: Server, cache: Path) -> None:
    server.answers = [announcing(2**50)]
    assert f"a file of {2**50:,} bytes is offered" in error_of(dataset(server), cache)


# --- no way to the file


def ways_on(text: str, url: str, cache: Path) -> bool:
    words = (
        f"from     {url}",
        SHA1,
        f"put that file at {cache / 'set.zip'}",
        "run the same command again",
        "data.root",
    )
    return all(word in text for word in words)


def test_without_a_network_it_says_how_to_go_on(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_names(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    text = error_of(dataset(server, url="http://data.example/set.zip"), cache)
    assert "could not be downloaded: Name or service not known (2 times in a row)" in text
    assert ways_on(text, "http://data.example/set.zip", cache)


def test_a_refused_connection_says_how_to_go_on(server: Server, cache: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip"
        text = error_of(dataset(server, url=url), cache)
    assert "Connection refused" in text
    assert ways_on(text, url, cache)


def test_a_server_that_never_answers_says_how_to_go_on(server: Server, cache: Path) -> None:
    server.answers = [silent]
    text = error_of(dataset(server), cache, timeout=0.1)
    assert "nothing came for 0.1 s (5 times in a row)" in text
    assert ways_on(text, server.url, cache)


@pytest.mark.parametrize(
    ("answer", "expected", "requests"),
    [
        (status(404), "the server answers 404 Not Found", 1),
        (status(403), "the server answers 403 Forbidden", 1),
        (status(204), "the server answers 204 No Content", 1),
        (status(416), "the server answers 416", 1),
        (status(500), "the server answers 500 Internal Server Error (5 times in a row)", 5),
        (
            status(302, Location="file:///etc/passwd"),
            "Redirection to url 'file:///etc/passwd' is not allowed",
            1,
        ),
        (status(302, Location="ftp://127.0.0.1/set.zip"), "unknown url type: ftp", 2),
        (status(302, Location="/set.zip"), "infinite loop", None),
        (status(302, Location="http://[::1/"), "Invalid IPv6 URL (5 times in a row)", 5),
        (status(302, Location="http://a..b/"), "label empty or too long", 5),
    ],
)
def test_an_answer_that_is_no_file_says_how_to_go_on(
    answer: Answer, expected: str, requests: int | None, server: Server, cache: Path
) -> None:
    server.answers = [answer]
    text = error_of(dataset(server), cache)
    assert expected in text
    assert ways_on(text, server.url, cache)
    assert requests in (None, len(server.asked))


def test_a_redirection_to_http_is_followed_with_the_range(server: Server, cache: Path) -> None:
    with_part(cache, DATA[:HALF], '"1"')
    server.answers = [status(302, Location="/elsewhere/set.zip"), ranges]
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [f"bytes={HALF}-"] * 2


def test_a_local_file_is_not_opened(server: Server, cache: Path) -> None:
    assert "unknown url type: file" in error_of(dataset(server, url="file:///etc/passwd"), cache)


# --- the disk


class Full(io.FileIO):
    """A file on a disk with room for 100 kB."""

    def write(self, data: Any) -> int:
        if self.tell() + len(data) > 100_000:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return super().write(data)


def full_for(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    usual = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, mode="r", *a, **k: (
            Full(self, mode) if self.name == name and mode != "rb" else usual(self, mode, *a, **k)
        ),
    )


def test_a_full_disk_keeps_what_has_come(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [ranges]
    with monkeypatch.context() as during:
        full_for(during, "set.zip.part")
        text = error_of(dataset(server), cache)
    assert (
        f"there is no room left in the cache {cache} (No space left on device); what has come is kept" in text
    )
    assert "data.cache" in text
    kept = (cache / "set.zip.part").stat().st_size
    assert 0 < kept <= 100_000
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert server.asked == [None, f"bytes={kept}-"]


def test_a_disk_that_fills_while_unpacking_leaves_no_half_of_it(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [ranges]
    with monkeypatch.context() as during:
        full_for(during, "1.jpg")
        assert "there is no room left" in error_of(dataset(server), cache)
    assert {p.name for p in cache.iterdir()} == {"set.zip", ".set.lock"}
    assert holds_the_pictures(get(dataset(server), cache), cache)
    assert len(server.asked) == 1


def test_too_little_room_is_told_before_the_download(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.answers = [whole]
    usage = unpack.shutil.disk_usage(cache.parent.parent)
    monkeypatch.setattr(unpack.shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "(400.3 kB needed, 1.0 kB free)" in error_of(dataset(server), cache)
    assert not (cache / "set.zip.part").exists()


def test_a_cache_below_a_file_is_an_error(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    text = error_of(dataset(server), tmp_path / "file" / "cache")
    assert f"the cache {tmp_path / 'file' / 'cache'} cannot be used (Not a directory" in text
    assert "data.cache (or $REGRAFT_CACHE)" in text


def test_a_cache_that_may_not_be_written_is_an_error_unless_it_is_there(
    server: Server, tmp_path: Path
) -> None:
    server.answers = [ranges]
    cache = tmp_path / "cache"
    cache.mkdir(mode=0o555)
    nobody, me = 65534, os.geteuid()
    with suppress(PermissionError):  # root may write anywhere: be somebody else for a moment
        os.seteuid(nobody)
    try:
        text = error_of(dataset(server), cache)
    finally:
        os.seteuid(me)
    assert "cannot be used (Permission denied" in text
    cache.chmod(0o755)
    folder = get(dataset(server), cache)
    (cache / ".set.lock").unlink()
    cache.chmod(0o555)
    assert get(dataset(server), cache) == folder
    assert not (cache / ".set.lock").exists(), "what is there is found without writing"


# --- other processes

FETCH = (
    "import sys; from pathlib import Path; from trainer.data.download import KnownDataset, fetch\n"
    "url, sha1, cache = sys.argv[1:]\n"
    "print(fetch(KnownDataset(name='set', url=url, sha1=sha1, size=None, folder='set'), Path(cache)))"
)


def start(server: Server, cache: Path, repository: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", FETCH, server.url, SHA1, cache],
        cwd=repository,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


@pytest.mark.parametrize("deadly", [signal.SIGKILL, signal.SIGINT], ids=["kill -9", "Ctrl-C"])
def test_what_a_killed_process_has_downloaded_is_not_downloaded_again(
    deadly: signal.Signals, server: Server, cache: Path, repository: Path
) -> None:
    server.answers = [stalled, ranges]
    with start(server, cache, repository) as process:
        part = cache / "set.zip.part"
        until = time.monotonic() + 10
        while not (part.exists() and part.stat().st_size == HALF) and time.monotonic() < until:
            time.sleep(0.01)
        process.send_signal(deadly)
        _, errors = process.communicate()
    assert process.returncode != 0
    assert ("KeyboardInterrupt" in errors) == (deadly == signal.SIGINT)
    assert part.stat().st_size == HALF
    assert holds_the_pictures(get(dataset(server), cache), cache), "and its lock has died with it"
    assert server.asked == [None, f"bytes={HALF}-"]
    assert server.sent == len(DATA)


def test_of_two_processes_one_downloads_and_the_other_waits(
    server: Server, cache: Path, repository: Path
) -> None:
    server.answers = [lambda handler: ranges(handler, pause=0.04)]
    seen: list[tuple[int, int | None]] = []
    with start(server, cache, repository) as first:
        while not server.asked and first.poll() is None:
            time.sleep(0.01)
        folder = get(dataset(server), cache, on_progress=lambda done, total: seen.append((done, total)))
        out, _ = first.communicate()
    assert out.strip() == str(folder)
    assert holds_the_pictures(folder, cache)
    assert (server.asked, server.sent) == ([None], len(DATA))
    assert len({done for done, _ in seen}) > 1, "the one that waits sees the other's progress"


def test_two_processes_that_start_at_once(server: Server, cache: Path, repository: Path) -> None:
    server.answers = [lambda handler: ranges(handler, pause=0.01)]
    with start(server, cache, repository) as first, start(server, cache, repository) as second:
        outcomes = [first.communicate(), second.communicate()]
    assert outcomes[0] == outcomes[1] == (f"{cache / f'set-{SHA1[:8]}' / 'set'}\n", "")
    assert server.sent == len(DATA)


def test_a_file_system_without_locks_is_named(
    server: Server, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_locks(*args: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(download.fcntl, "flock", no_locks)
    assert f"the cache {cache} cannot be used (Function not implemented" in error_of(dataset(server), cache)


# --- what is seen


def test_the_bar_shows_size_speed_and_what_is_left_and_leaves_one_line(server: Server, cache: Path) -> None:
    server.answers = [lambda handler: ranges(handler, pause=0.02)]
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=100, highlight=False, color_system=None)
    with progress_bar("downloading set", console=console) as on_progress:
        get(dataset(server), cache, on_progress=on_progress)
    text = screen.getvalue()
    assert re.search(r"downloading set .*━.* \d+\.\d/400\.3 kB \d+\.\d .B/s ETA \d", text)
    assert text.endswith("downloading set: 400.3 kB in 0 s\n")


def test_without_a_terminal_there_is_a_line_for_each_tenth(server: Server, cache: Path) -> None:
    server.answers = [ranges]
    screen = io.StringIO()
    with progress_bar(
        "downloading set", console=Console(file=screen, width=20, soft_wrap=True)
    ) as on_progress:
        get(dataset(server), cache, on_progress=on_progress)
    lines = screen.getvalue().splitlines()
    assert lines[0] == "downloading set: 0 bytes"
    assert lines[-1] == "downloading set: 100 % of 400.3 kB"
    assert 3 <= len(lines) <= 12
    assert len(set(lines)) == len(lines)


@pytest.mark.parametrize("terminal", [True, False])
def test_nothing_is_shown_of_what_is_cached(terminal: bool, server: Server, cache: Path) -> None:
    server.answers = [ranges]
    get(dataset(server), cache)
    screen = io.StringIO()
    with progress_bar(
        "downloading set", console=Console(file=screen, force_terminal=terminal)
    ) as on_progress:
        get(dataset(server), cache, on_progress=on_progress)
    assert screen.getvalue() == ""


def test_the_bar_is_taken_away_by_an_error(server: Server, cache: Path) -> None:
    server.answers = [status(404)]
    screen = io.StringIO()
    with (
        pytest.raises(UserError),
        progress_bar("downloading set", console=Console(file=screen, force_terminal=True)) as on_progress,
    ):
        get(dataset(server), cache, on_progress=on_progress)
    assert screen.getvalue().endswith("\x1b[2K"), "the line is wiped"
    assert " in 0 s" not in screen.getvalue()
