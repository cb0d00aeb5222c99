"""Against real HTTP servers on loopback that truncate, lie, stall and reset."""

import hashlib
import os
import random
import socket
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.web import (
    DATA,
    HALF,
    SHA1,
    Answer,
    Handler,
    Server,
    announcing,
    chunked,
    cut,
    cut_whole,
    endless,
    hung_up,
    page,
    partial,
    ranges,
    reset,
    serving,
    silent,
    stalled,
    status,
    unannounced,
    whole,
)
from trainer.data import transfer as module
from trainer.data.transfer import RemoteFile, TransferFailed, transfer


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    with serving(monkeypatch) as running:
        yield running


@pytest.fixture
def path(tmp_path: Path) -> Path:
    (tmp_path / "a folder").mkdir()
    return tmp_path / "a folder" / "set.zip"


def remote(server: Server, path: Path, **changes: Any) -> RemoteFile:
    return replace(RemoteFile(url=server.url, path=path, sha1=SHA1, size=None), **changes)


def arrives(wanted: RemoteFile, *, timeout: float = 1.0) -> bool:
    """Return whether the right file comes, and nothing is left beside it."""
    transfer(wanted, lambda done, total: None, timeout=timeout, pause=0.01)
    return list(wanted.path.parent.iterdir()) == [wanted.path] and wanted.path.read_bytes() == DATA


def error_of(wanted: RemoteFile, *, timeout: float = 1.0) -> str:
    with pytest.raises(TransferFailed) as caught:
        transfer(wanted, lambda done, total: None, timeout=timeout, pause=0.01)
    assert not wanted.path.exists()
    return str(caught.value)


def part_of(path: Path) -> Path:
    return path.parent / "set.zip.part"


def with_part(path: Path, content: bytes, version: str = "") -> Path:
    (path.parent / "set.zip.part.version").write_text(version)
    part_of(path).write_bytes(content)
    return part_of(path)


@pytest.mark.parametrize("answer", [whole, ranges, unannounced, chunked])
def test_a_file_comes_and_its_progress_is_told(answer: Answer, server: Server, path: Path) -> None:
    server.answers = [answer]
    seen: list[tuple[int, int | None]] = []
    transfer(
        remote(server, path),
        lambda done, total: seen.append((done, total)),
        timeout=1.0,
        pause=0.01,
    )
    assert list(path.parent.iterdir()) == [path]
    assert path.read_bytes() == DATA
    known = None if answer in (unannounced, chunked) else len(DATA)
    assert (seen[0], seen[-1]) == ((0, None), (len(DATA), known))
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


# --- interruptions


@pytest.mark.parametrize("interruption", [cut(HALF), stalled, reset])
def test_an_interrupted_download_goes_on_where_it_stopped(
    interruption: Answer, server: Server, path: Path
) -> None:
    server.answers = [interruption, ranges]
    assert arrives(remote(server, path))
    assert server.asked == [None, f"bytes={HALF}-"]
    assert server.if_range == [None, '"1"']
    assert server.sent == len(DATA)


@pytest.mark.parametrize("trouble", [silent, hung_up, status(500), status(503), status(429)])
def test_what_may_pass_is_tried_again(trouble: Answer, server: Server, path: Path) -> None:
    server.answers = [trouble, trouble, ranges]
    assert arrives(remote(server, path), timeout=0.5)
    assert len(server.asked) == 3


def test_a_server_that_truncates_always_is_read_to_the_end_as_long_as_the_file_grows(
    server: Server, path: Path
) -> None:
    server.answers = [lambda handler: ranges(handler, upto=handler.offset + 70_000)]
    server.answers += [hung_up, hung_up] + server.answers * 10
    assert arrives(remote(server, path))
    assert server.sent == len(DATA)


def test_a_server_that_truncates_always_and_knows_no_range_is_given_up(server: Server, path: Path) -> None:
    server.answers = [cut_whole]
    text = error_of(remote(server, path))
    assert f"the connection ended after {HALF:,} of {len(DATA):,} bytes" in text
    assert len(server.asked) == module.TRIES
    assert part_of(path).read_bytes() == DATA[:HALF]


def test_a_server_without_ranges_sends_it_all_again(server: Server, path: Path) -> None:
    server.answers = [cut_whole, whole]
    assert arrives(remote(server, path))
    assert server.asked == [None, f"bytes={HALF}-"]


def test_a_file_that_has_changed_on_the_server_is_not_mixed_with_the_old_one(
    server: Server, path: Path
) -> None:
    with_part(path, b"old" * 1000, '"0"')
    server.answers = [ranges]
    assert arrives(remote(server, path))
    assert server.if_range == ['"0"']
    assert server.sent == len(DATA)


def test_a_weak_tag_does_not_tell_versions_apart_but_the_date_does(server: Server, path: Path) -> None:
    date = "Wed, 21 Oct 2015 07:28:00 GMT"

    def dated(handler: Handler) -> None:
        handler.head(200, Content_Length=len(DATA), ETag='W/"1"', Last_Modified=date)
        handler.body(DATA[:HALF])

    server.answers = [dated, lambda handler: ranges(handler, tag=date)]
    assert arrives(remote(server, path))
    assert server.if_range == [None, date]
    assert server.sent == len(DATA)


def test_a_resumed_file_with_a_wrong_hash_is_downloaded_once_more_from_zero(
    server: Server, path: Path
) -> None:
    with_part(path, b"x" * 1000)
    server.answers = [ranges]
    assert arrives(remote(server, path))
    assert server.asked == ["bytes=1000-", None]


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
@pytest.mark.parametrize("answer", [unannounced, chunked])
def test_a_body_of_unannounced_length_that_is_cut_is_noticed(
    answer: Callable[..., None], known: bool, server: Server, path: Path
) -> None:
    server.answers = [lambda handler: answer(handler, upto=100_000), ranges]
    wanted = remote(server, path, size=len(DATA) if known else None)
    assert arrives(wanted)
    resumed = known or answer is chunked
    assert server.asked == [None, "bytes=100000-" if resumed else None]


def test_a_part_that_is_all_of_it_needs_no_network(server: Server, path: Path) -> None:
    with_part(path, DATA)
    assert arrives(remote(server, path))
    assert server.asked == []


def test_a_part_with_more_than_the_file_begins_again(server: Server, path: Path) -> None:
    with_part(path, DATA + b"more")
    server.answers = [ranges]
    assert arrives(remote(server, path))
    assert server.asked == [f"bytes={len(DATA) + 4}-", None]


@pytest.mark.parametrize("version", ["图", '"1"\r\nEvil: 1'])
def test_a_damaged_version_file_is_not_sent(version: str, server: Server, path: Path) -> None:
    with_part(path, DATA[:HALF], version)
    server.answers = [ranges]
    assert arrives(remote(server, path))
    assert (server.asked, server.if_range) == ([f"bytes={HALF}-"], [None])


@pytest.mark.parametrize(
    "given",
    [f"bytes 0-{HALF}/{len(DATA)}", f"bytes {HALF + 1}-{len(DATA) - 1}/{len(DATA)}", "bytes */5", "x"],
)
def test_a_wrong_content_range_begins_again(given: str, server: Server, path: Path) -> None:
    with_part(path, DATA[:HALF])
    server.answers = [partial(given), ranges]
    assert arrives(remote(server, path))
    assert server.asked == [f"bytes={HALF}-", None]


def test_a_range_to_an_unknown_end_is_taken(server: Server, path: Path) -> None:
    with_part(path, DATA[:HALF])
    server.answers = [partial(f"bytes {HALF}-{len(DATA) - 1}/*")]
    assert arrives(remote(server, path))


def test_whatever_a_server_does_the_right_file_comes_out_or_none(server: Server, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    dice = random.Random(seed)
    kinds = [whole, ranges, chunked, unannounced, reset, hung_up, status(500), cut_whole, status(416), page]
    kinds += [partial("bytes 0-9/10"), announcing(HALF), announcing(len(DATA) + 9)]
    for i in range(12):
        (tmp_path / str(i)).mkdir()
        cuts = [cut(dice.randrange(len(DATA))) for _ in range(3)]
        server.asked.clear()
        server.answers = [dice.choice(kinds + cuts) for _ in range(dice.randint(1, 6))] + [ranges]
        for _ in range(10):
            with suppress(TransferFailed):
                assert arrives(remote(server, tmp_path / str(i) / "set.zip"))
                break
        else:
            pytest.fail("the last answer is right, and was not reached")


# --- lies


def test_more_announced_than_there_is(server: Server, path: Path) -> None:
    server.answers = [announcing(len(DATA) + 100)]
    assert arrives(remote(server, path)), "all of it has come, by its SHA-1"
    assert len(server.asked) == 1


def test_less_announced_than_there_is(server: Server, path: Path) -> None:
    server.answers = [announcing(HALF)]
    text = error_of(remote(server, path))
    assert f"{HALF:,} bytes of SHA-1 {hashlib.sha1(DATA[:HALF]).hexdigest()}" in text
    assert not part_of(path).exists()


def test_another_file_is_refused_with_its_hash(server: Server, path: Path) -> None:
    other = b"PK" + os.urandom(1000)
    server.answers = [lambda handler: ranges(handler, data=other)]
    text = error_of(remote(server, path))
    assert "another file came than expected, 1,002 bytes" in text
    assert hashlib.sha1(other).hexdigest() in text
    assert list(path.parent.iterdir()) == []
    assert len(server.asked) == 1, "it came whole, so another try would bring the same"


def test_a_file_of_another_size_than_known_is_refused_before_it_is_downloaded(
    server: Server, path: Path
) -> None:
    part = with_part(path, DATA[:1000])
    server.answers = [whole]
    text = error_of(remote(server, path, size=len(DATA) + 1))
    assert f"of {len(DATA):,} bytes (content type application/zip); expected {len(DATA) + 1:,}" in text
    assert part.read_bytes() == DATA[:1000]


def test_a_login_page_is_shown_for_what_it_is_and_does_not_cost_what_has_come(
    server: Server, path: Path
) -> None:
    part = with_part(path, DATA[:HALF])
    server.answers = [page]
    text = error_of(remote(server, path))
    assert "sends a web page (content type text/html; charset=utf-8" in text
    assert "<!DOCTYPE html><title>Please log in" in text
    assert part.read_bytes() == DATA[:HALF]
    server.answers = [ranges]
    assert arrives(remote(server, path))


@pytest.mark.parametrize("known", [True, False], ids=["size known", "size unknown"])
def test_an_endless_body_ends(
    known: bool, server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "GREATEST", 2_000_000)
    server.answers = [endless]
    text = error_of(remote(server, path, size=len(DATA) if known else None))
    assert f"does not end: more than {len(DATA) if known else 2_000_000:,} bytes came" in text
    assert not part_of(path).exists()


def test_a_preposterous_size_is_refused(server: Server, path: Path) -> None:
    server.answers = [announcing(2**50)]
    assert f"a file of {2**50:,} bytes is offered" in error_of(remote(server, path))


# --- no way to the file


def test_without_a_network_it_is_given_up_soon(
    server: Server, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_names(*args: object, **options: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", no_names)
    text = error_of(remote(server, path, url="http://data.example/set.zip"))
    assert text == "Name or service not known (2 times in a row)"


def test_a_refused_connection_is_told(server: Server, path: Path) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}/set.zip"
        text = error_of(remote(server, path, url=url))
    assert "Connection refused" in text


def test_a_server_that_never_answers_is_given_up(server: Server, path: Path) -> None:
    server.answers = [silent]
    text = error_of(remote(server, path), timeout=0.1)
    assert "nothing came for 0.1 s (5 times in a row)" in text


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
def test_an_answer_that_is_no_file_is_told(
    answer: Answer, expected: str, requests: int | None, server: Server, path: Path
) -> None:
    server.answers = [answer]
    text = error_of(remote(server, path))
    assert expected in text
    assert requests in (None, len(server.asked))


def test_a_redirection_to_http_is_followed_with_the_range(server: Server, path: Path) -> None:
    with_part(path, DATA[:HALF], '"1"')
    server.answers = [status(302, Location="/elsewhere/set.zip"), ranges]
    assert arrives(remote(server, path))
    assert server.asked == [f"bytes={HALF}-"] * 2


def test_a_local_file_is_not_opened(server: Server, path: Path) -> None:
    assert "unknown url type: file" in error_of(remote(server, path, url="file:///etc/passwd"))
