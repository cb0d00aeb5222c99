"""Show images in a terminal: by the kitty graphics protocol, by iTerm2's inline images, or as sixels.

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
from contextlib import suppress
from dataclasses import dataclass
from io import BytesIO
from typing import Literal

import numpy as np
from PIL import Image

Protocol = Literal["kitty", "iterm2", "sixel"]
_ITERM2_PROGRAMS = ("iTerm.app", "WezTerm", "mintty")
_ATTRIBUTES_QUERY = "\x1b[c"
"""Asks for the attributes of the terminal, which every terminal answers. Attribute 4 stands for sixels."""
_KITTY_QUERY = "\x1b_Gi=31,s=1,v=1,a=q,t=d,f=24;AAAA\x1b\\"
"""Asks for kitty's protocol by an image of one pixel."""
_QUERY_SECONDS = 2.0
"""How long an answer is awaited. A later answer would be typed into the shell."""
_ERASE_LINE = "\r\x1b[K"
_KITTY_CHUNK = 4096
_SIXEL_COLORS = 255
_SIXEL_MAX_WIDTH = 1000
"""xterm draws nothing of an image that has more than 1000 pixels in a row or a column."""
_PIXELS_PER_COLUMN = 8
"""Width of a character if the terminal does not tell its size in pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageTerminal:
    """The terminal of standard output, which can show images."""

    protocol: Protocol
    width: int
    """Maximum width of an image [pixels]."""

    def show(self, image: Image.Image) -> None:
        """Show an RGBA image of at most 1000 rows, and start a new line below it."""
        sys.stdout.flush()
        content = memoryview(f"{encode_image(image, self.protocol)}\n".encode("ascii"))
        try:
            while content:
                content = content[os.write(sys.stdout.fileno(), content) :]
        except BaseException:
            # The terminal would take all that follows, as the prompt of the shell, for a part of the image.
            end = "\x1b\\\x1b_Gm=0,q=2;\x1b\\" if self.protocol == "kitty" else "\x1b\\"
            with suppress(OSError):  # the terminal may be closed
                os.write(sys.stdout.fileno(), f"{end}\n".encode("ascii"))
            raise


def find_image_terminal() -> ImageTerminal | None:
    """Return the terminal of this process if it can show images and the process may use it."""
    if not (sys.stdin.isatty() and sys.stdout.isatty() and _in_foreground(sys.stdin.fileno())):
        return None
    protocol = detect_protocol(os.environ, ask_terminal)
    if protocol is None:
        return None
    width = _terminal_width()
    return ImageTerminal(protocol=protocol, width=min(width, _SIXEL_MAX_WIDTH) if protocol == "sixel" else width)


def detect_protocol(environment: Mapping[str, str], ask: Callable[[str], str]) -> Protocol | None:
    """Return the protocol that the terminal understands.

    Args:
        environment: environment variables.
        ask: sends a query to the terminal, and returns its answer.

    """
    term = environment.get("TERM", "dumb")
    if term in ("dumb", "linux"):
        return None
    if "TMUX" in environment or "STY" in environment or term.startswith(("screen", "tmux")):
        answer = ask(_ATTRIBUTES_QUERY)  # tmux takes the query for kitty's protocol for the title of the pane
    elif {environment.get("TERM_PROGRAM"), environment.get("LC_TERMINAL")} & {*_ITERM2_PROGRAMS, "iTerm2"}:
        return "iterm2"
    else:
        answer = ask(_KITTY_QUERY + _ATTRIBUTES_QUERY)
    if "\x1b_Gi=31;OK" in answer:
        return "kitty"
    attributes = re.search(r"\x1b\[\?([0-9;]*)c", answer)
    return "sixel" if attributes is not None and "4" in attributes[1].split(";") else None


def ask_terminal(query: str) -> str:
    """Send a query to the terminal; return its answer up to the attributes, or what came within two seconds."""
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
        with suppress(OSError, termios.error):  # the terminal may be closed
            termios.tcsetattr(handle, termios.TCSAFLUSH, settings)  # with what is typed meanwhile
            sys.stdout.write(_ERASE_LINE)  # some terminals print the query for kitty's protocol
            sys.stdout.flush()
    return answer.decode("ascii", "replace")


def encode_image(image: Image.Image, protocol: Protocol) -> str:
    """Return the escape sequences that show an RGBA image."""
    if protocol == "sixel":
        return "".join(_sixels(image))
    buffer = BytesIO()
    image.save(buffer, format="png")
    content = base64.b64encode(buffer.getvalue()).decode("ascii")
    if protocol == "iterm2":
        return f"\x1b]1337;File=inline=1;size={buffer.tell()};width={image.width}px:{content}\x07"
    chunks = [content[start : start + _KITTY_CHUNK] for start in range(0, len(content), _KITTY_CHUNK)]
    return "".join(
        f"\x1b_G{'a=T,f=100,q=2,' if index == 0 else ''}m={int(index < len(chunks) - 1)};{chunk}\x1b\\"
        for index, chunk in enumerate(chunks)
    )


def _sixels(image: Image.Image) -> Iterator[str]:
    """Yield an image as sixels: bands of 6 rows, each drawn once for each of its colors. Transparent pixels are not."""
    rgb = image.convert("RGB")
    palette = rgb.quantize(_SIXEL_COLORS)
    indexed = np.asarray(rgb.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG), dtype=np.int16)
    pixels = np.where(np.asarray(image.getchannel("A")) < 128, -1, indexed)
    percents = (np.array(palette.getpalette("RGB"), dtype=int).reshape(-1, 3) * 100 + 127) // 255
    yield f'\x1bP0;1q"1;1;{image.width};{image.height}'
    yield from (f"#{number};2;{red};{green};{blue}" for number, (red, green, blue) in enumerate(percents))
    columns = np.arange(image.width)
    for top in range(0, image.height, 6):
        colors, numbers = np.unique(pixels[top : top + 6], return_inverse=True)
        sixels = np.full((len(colors), image.width), ord("?"), dtype=np.uint8)
        for row, colors_of_row in enumerate(numbers.reshape(-1, image.width)):
            sixels[colors_of_row, columns] += 1 << row
        lines = (bytes(line).decode("ascii") for line in sixels)
        yield "-" if top else ""
        yield "$".join(f"#{color}{_run_lengths(line)}" for color, line in zip(colors, lines, strict=True) if color >= 0)
    yield "\x1b\\"


def _run_lengths(sixels: str) -> str:
    """Return sixels with runs of equal ones as `!COUNT`."""
    return re.sub(r"(.)\1{3,}", lambda run: f"!{len(run[0])}{run[1]}", sixels.rstrip("?"))


def _in_foreground(handle: int) -> bool:
    """Return whether this process may write to the terminal; otherwise the kernel would stop it."""
    try:
        return os.tcgetpgrp(handle) == os.getpgrp()
    except OSError:  # not the terminal that controls this process
        return True


def _terminal_width() -> int:
    """Return the width of the terminal in pixels."""
    size = fcntl.ioctl(sys.stdout.fileno(), termios.TIOCGWINSZ, b"\0" * 8)
    _, columns, pixels, _ = struct.unpack("HHHH", size)
    return int(pixels or (columns or 80) * _PIXELS_PER_COLUMN)
