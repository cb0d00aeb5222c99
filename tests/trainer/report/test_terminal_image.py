import base64
import fcntl
import io
import os
import pty
import re
import select
import struct
import sys
import termios
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
from PIL import Image

from trainer.report import terminal_image
from trainer.report.image_grid import ClassSamples, make_strip
from trainer.report.terminal_image import (
    ImageTerminal,
    Protocol,
    ask_terminal,
    detect_protocol,
    encode_image,
    find_image_terminal,
)

PICTURE = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(7, 5, 3) * 2).convert("RGBA")
PICTURE.putpixel((2, 6), (0, 0, 0, 0))
TERMINALS = {
    "kitty": b"\x1b_Gi=31;OK\x1b\\\x1b[?62;c",
    "sixel": b"\x1b[?63;1;2;4;6c",
    "text": b"\x1b[?64;14;22c",
    "slow": b"",
}


def decode_sixels(text: str) -> np.ndarray:
    """Return the RGB image that a terminal draws, with colors in percent, and -1 where it draws nothing."""
    header, body = re.fullmatch(r'\x1bP0;1q"1;1;(\d+;\d+)(.*)\x1b\\', text, re.DOTALL).groups()  # type: ignore[union-attr]
    width, height = map(int, header.split(";"))
    image = np.full((-(-height // 6) * 6, width, 3), -1)
    colors: dict[int, tuple[int, int, int]] = {}
    x, top, color = 0, 0, 0
    for match in re.finditer(r"#(\d+);2;(\d+);(\d+);(\d+)|#(\d+)|(?:!(\d+))?([?-~])|([$-])", body):
        defined, red, green, blue, chosen, count, sixel, move = match.groups()
        if defined:
            colors[int(defined)] = (int(red), int(green), int(blue))
        elif chosen:
            color = int(chosen)
        elif move:
            x, top = 0, top + 6 * (move == "-")
        else:
            rows = [top + row for row in range(6) if (ord(sixel) - 63) >> row & 1]
            image[rows, x : x + int(count or 1)] = colors[color]
            x += int(count or 1)
    return image[:height]


def test_a_picture_is_encoded_for_each_protocol() -> None:
    drawn = decode_sixels(encode_image(PICTURE, "sixel"))
    assert drawn.shape == (7, 5, 3)
    transparent = np.asarray(PICTURE)[..., 3] == 0
    assert np.array_equal((drawn == -1).all(axis=2), transparent)
    expected = np.asarray(PICTURE.convert("RGB")) / 255 * 100
    assert np.abs(drawn - expected)[~transparent].max() < 3
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8))
    chunks = re.findall(r"\x1b_G(.*?)m=(.);(.*?)\x1b\\", encode_image(wide, "kitty"))
    assert [(control, more) for control, more, _ in chunks] == [
        ("a=T,f=100,q=2,", "1"), *[("", "1")] * (len(chunks) - 2), ("", "0")
    ]  # fmt: skip
    assert max(len(content) for *_, content in chunks) <= 4096
    content = re.fullmatch(r"\x1b]1337;File=inline=1;size=\d+;width=5px:(.*)\x07", encode_image(PICTURE, "iterm2"))
    assert content is not None
    for encoded, expected in (("".join(content for *_, content in chunks), wide), (content[1], PICTURE)):
        with Image.open(io.BytesIO(base64.b64decode(encoded))) as image:
            assert np.array_equal(np.asarray(image), np.asarray(expected))


@pytest.mark.parametrize(
    ("environment", "answer", "protocol"),
    [
        ({"TERM": "xterm-kitty"}, "\x1b_Gi=31;OK\x1b\\\x1b[?62;c", "kitty"),
        ({"TERM": "xterm-256color"}, "\x1b[?62;4;22c", "sixel"),
        ({"TERM": "xterm-256color"}, "\x1b[?64;14;22c", None),
        ({"TERM": "xterm-256color"}, "", None),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, "", "iterm2"),
        ({"TERM": "xterm-256color", "LC_TERMINAL": "iTerm2"}, "", "iterm2"),
        ({"TERM": "tmux-256color", "TMUX": "x", "LC_TERMINAL": "iTerm2"}, "\x1b[?1;2;4c", "sixel"),
        ({"TERM": "tmux-256color", "LC_TERMINAL": "iTerm2"}, "\x1b[?1;2c", None),
        ({"TERM": "xterm-256color", "STY": "1.pts", "TERM_PROGRAM": "WezTerm"}, "\x1b[?1;2c", None),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, "", None),
        ({"TERM": "dumb"}, "\x1b[?4c", None),
        ({}, "\x1b[?4c", None),
    ],
)
def test_the_protocol_of_the_terminal_is_detected(
    environment: dict[str, str], answer: str, protocol: str | None
) -> None:
    def ask(query: str) -> str:
        multiplexer = "tmux" in environment["TERM"] or "STY" in environment
        assert ("\x1b_G" in query) is not multiplexer, "tmux takes kitty's query for a title"
        return answer

    assert detect_protocol(environment, ask) == protocol


@contextmanager
def terminal(kind: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Connect standard input and output to a terminal that answers as one of `TERMINALS`; yield its other end."""
    for name in ("TMUX", "STY", "TERM_PROGRAM", "LC_TERMINAL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setattr(terminal_image, "_QUERY_SECONDS", 5.0 if TERMINALS[kind] else 0.05)
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 130, 0, 0))

    def answer() -> None:
        received = b""
        while not received.endswith(b"\x1b[c"):
            received += os.read(master, 1024)
        os.write(master, TERMINALS[kind])

    thread = threading.Thread(target=answer, daemon=True)
    thread.start()
    with os.fdopen(os.dup(slave)) as stdin, os.fdopen(slave, "w") as stdout, monkeypatch.context() as patched:
        patched.setattr(sys, "stdin", stdin)
        patched.setattr(sys, "stdout", stdout)
        try:
            yield master
        finally:
            os.write(slave, b"\x1b[c")  # ends the thread
            thread.join()
    os.close(master)


@pytest.mark.parametrize("kind", TERMINALS)
def test_a_query_leaves_the_terminal_as_it_was(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with terminal(kind, monkeypatch) as other_end:
        settings = termios.tcgetattr(sys.stdin)
        found = find_image_terminal()
        assert (found and found.protocol) == (kind if kind in get_args(Protocol) else None)
        assert found is None or found.width == {"kitty": 130 * 8, "sixel": 1000}[kind]
        assert termios.tcgetattr(sys.stdin) == settings
        assert not select.select([sys.stdin], [], [], 0)[0], "the shell would read the rest of the answer"
        assert os.read(other_end, 1024) == b"\r\x1b[K", "some terminals print the query for kitty's protocol"


def test_a_stop_on_a_terminal_that_is_closed_stays_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StopError(Exception):
        pass

    image = Image.new("RGBA", (8, 8))
    with terminal("kitty", monkeypatch), monkeypatch.context() as patched:
        patched.setattr(select, "select", Mock(side_effect=StopError))
        patched.setattr(termios, "tcsetattr", Mock(side_effect=termios.error))
        with pytest.raises(StopError):
            ask_terminal("\x1b[c")
    with (tmp_path / "screen").open("w") as screen, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        patched.setattr(os, "write", Mock(side_effect=[StopError, OSError]))
        with pytest.raises(StopError):
            ImageTerminal(protocol="kitty", width=80).show(image)


def test_a_process_in_the_background_does_not_use_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "tcgetpgrp", lambda handle: os.getpgrp() + 1)
    with terminal("kitty", monkeypatch):
        settings = termios.tcgetattr(sys.stdin)
        assert find_image_terminal() is None
        assert termios.tcgetattr(sys.stdin) == settings


@pytest.mark.parametrize("protocol", get_args(Protocol))
def test_an_interrupted_image_does_not_swallow_what_follows(
    protocol: Protocol, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, writes = os.write, []

    def interrupted_write(handle: int, content: bytes) -> int:
        writes.append(content)
        if len(writes) == 1:
            write(handle, content[: len(content) // 2])
            raise KeyboardInterrupt
        return write(handle, content)

    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8)).convert("RGBA")
    with (tmp_path / "screen").open("w") as screen, monkeypatch.context() as patched:
        patched.setattr(sys, "stdout", screen)
        patched.setattr(os, "write", interrupted_write)
        with pytest.raises(KeyboardInterrupt):
            ImageTerminal(protocol=protocol, width=80).show(noise)
        screen.write("$ ")
    received = (tmp_path / "screen").read_text()
    sequences = r"\x1b[P_](.*?)\x1b\\|\x1b\](.*?)(?:\x07|\x1b\\)|\x1b\\"
    assert re.sub(sequences, "", received, flags=re.DOTALL) == "\n$ "
    if protocol == "kitty":
        assert re.findall(r"\x1b_G[^;]*?m=(.)", received)[-2:] == ["1", "0"], "no more of the image is awaited"


@pytest.mark.parametrize(("width", "size"), [(320, (320, 160)), (640, (640, 160)), (3000, (1320, 330)), (40, (40, 80))])
def test_a_strip_has_as_many_images_as_can_be_recognized(width: int, size: tuple[int, int]) -> None:
    images = [Image.new("RGB", shape, "red") for shape in ((90, 60), (1, 4000), (5000, 2), *[(64, 64)] * 5)]
    strip = make_strip(ClassSamples(caption="a", originals=images, augmented=images), width)
    assert strip.size == size
    alpha = np.asarray(strip)[..., 3]
    cell = size[1] // 2
    assert (alpha[:, :2] == 0).all()
    assert all((alpha[cell * row + cell // 2 :][:1] > 0).any() for row in (0, 1))
    few = make_strip(ClassSamples(caption="a", originals=images[:1], augmented=images[:1]), width)
    assert few.size == (cell, size[1])
