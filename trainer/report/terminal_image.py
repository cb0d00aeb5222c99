"""Show a picture in a terminal: by the kitty graphics protocol, by iTerm2's inline images, or as sixels.

Protocols: https://sw.kovidgoyal.net/kitty/graphics-protocol, https://iterm2.com/documentation-images.html, and
https://vt100.net/docs/vt3xx-gp/chapter14.html for sixels.
"""

import base64
import fcntl
import os
import re
import select
import struct
import sys
import termios
import time
import tty
from collections.abc import Callable, Iterator, Mapping
from io import BytesIO
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image

Protocol = Literal["kitty", "iterm2", "sixel"]
_ITERM2_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_QUERY = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\\x1b[c"
"""Asks for kitty's protocol by an image of one pixel, then for the terminal's attributes, which every one answers."""
_QUERY_SECONDS = 0.5
_KITTY_CHUNK = 4096
_SIXEL_COLORS = 255
_PIXELS_PER_COLUMN = 8
"""Width of a character if the terminal does not tell its size in pixels."""


def show_image(path: Path) -> bool:
    """Show a PNG file on standard output, as wide as the terminal at most; return whether the terminal can."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        return False
    protocol = detect_protocol(os.environ, ask_terminal)
    if protocol is None:
        return False
    pixels = _terminal_width()
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    if rgb.width > pixels:
        rgb = rgb.resize((pixels, max(1, round(rgb.height * pixels / rgb.width))), Image.Resampling.LANCZOS)
    sys.stdout.write(f"{encode_image(rgb, protocol)}\n")
    sys.stdout.flush()
    return True


def detect_protocol(environment: Mapping[str, str], ask: Callable[[str], str]) -> Protocol | None:
    """Return the protocol that the terminal understands.

    Args:
        environment: environment variables.
        ask: sends a query to the terminal, and returns its answer.

    """
    in_multiplexer = "TMUX" in environment or environment.get("TERM", "").startswith("screen")
    programs = (environment.get("TERM_PROGRAM"), environment.get("LC_TERMINAL"))
    if not in_multiplexer and any(program in (*_ITERM2_PROGRAMS, "iTerm2") for program in programs):
        return "iterm2"
    if environment.get("TERM", "dumb") in ("dumb", "linux"):
        return None
    answer = ask(_QUERY)
    if "\x1b_Gi=31;OK" in answer:
        return "kitty"
    attributes = re.search(r"\x1b\[\?([0-9;]*)c", answer)
    return "sixel" if attributes is not None and "4" in attributes[1].split(";") else None


def ask_terminal(query: str) -> str:
    """Send a query to the terminal; return its answer up to the attributes, or what came within half a second."""
    handle, answer = sys.stdin.fileno(), b""
    settings = termios.tcgetattr(handle)
    deadline = time.monotonic() + _QUERY_SECONDS
    try:
        tty.setcbreak(handle)
        sys.stdout.write(query)
        sys.stdout.flush()
        while not re.search(rb"\x1b\[\?[0-9;]*c", answer):
            ready, _, _ = select.select([handle], [], [], max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            answer += os.read(handle, 1024)
    finally:
        termios.tcsetattr(handle, termios.TCSAFLUSH, settings)  # with what is typed meanwhile
    return answer.decode("ascii", "replace")


def encode_image(image: Image.Image, protocol: Protocol) -> str:
    """Return the escape sequences that show an RGB image."""
    if protocol == "sixel":
        return "".join(_sixels(image))
    buffer = BytesIO()
    image.save(buffer, format="png")
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={buffer.tell()};width={image.width}px:{content}\x07"
    chunks = [content[start : start + _KITTY_CHUNK] for start in range(0, len(content), _KITTY_CHUNK)]
    return "".join(
        f"\x1b_G{'a=T,f=100,' if index == 0 else ''}m={int(index < len(chunks) - 1)};{chunk}\x1b\\"
        for index, chunk in enumerate(chunks)
    )


def _sixels(image: Image.Image) -> Iterator[str]:
    """Yield an image as sixels: bands of 6 rows, each drawn once for each of its colors."""
    indexed = image.quantize(_SIXEL_COLORS)
    palette = np.array(indexed.getpalette("RGB"), dtype=int).reshape(-1, 3) * 100 // 255
    pixels = np.asarray(indexed)
    yield f'\x1bPq"1;1;{image.width};{image.height}'
    yield from (f"#{number};2;{red};{green};{blue}" for number, (red, green, blue) in enumerate(palette))
    for top in range(0, image.height, 6):
        band = pixels[top : top + 6]
        weights = 1 << np.arange(len(band))[:, None]
        yield "$".join(f"#{color}{_run_lengths(((band == color) * weights).sum(0))}" for color in np.unique(band))
        yield "-"
    yield "\x1b\\"


def _run_lengths(sixels: np.ndarray) -> str:
    """Return columns of 6 pixels as characters; runs of equal ones as `!COUNT`."""
    starts = np.flatnonzero(np.diff(sixels, prepend=-1))
    lengths = np.diff(starts, append=len(sixels))
    return "".join(
        chr(63 + value) * length if length < 4 else f"!{length}{chr(63 + value)}"
        for value, length in zip(sixels[starts].tolist(), lengths.tolist(), strict=True)
    )


def _terminal_width() -> int:
    """Return the width of the terminal in pixels."""
    size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    _, columns, pixels, _ = struct.unpack("HHHH", size)
    return int(pixels or (columns or 80) * _PIXELS_PER_COLUMN)
