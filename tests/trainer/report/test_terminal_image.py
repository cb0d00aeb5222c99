import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from trainer.report.terminal_image import detect_protocol, encode_image

PICTURE = Image.fromarray(np.arange(5 * 7 * 3, dtype=np.uint8).reshape(7, 5, 3) * 2)


def decode_sixels(text: str) -> np.ndarray:
    """Return the RGB image that a terminal draws, with colors in percent."""
    header, body = re.fullmatch(r'\x1bPq"1;1;(\d+;\d+)(.*)\x1b\\', text, re.DOTALL).groups()  # type: ignore[union-attr]
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
    assert np.abs(drawn - np.asarray(PICTURE) / 255 * 100).max() < 3
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 80, 3), dtype=np.uint8))
    chunks = re.findall(r"\x1b_G(.*?)m=(.);(.*?)\x1b\\", encode_image(wide, "kitty"))
    assert [(control, more) for control, more, _ in chunks] == [
        ("a=T,f=100,", "1"), *[("", "1")] * (len(chunks) - 2), ("", "0")
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
        ({"TERM": "dumb"}, "\x1b[?4c", None),
        ({}, "\x1b[?4c", None),
    ],
)
def test_the_protocol_of_the_terminal_is_detected(
    environment: dict[str, str], answer: str, protocol: str | None
) -> None:
    assert detect_protocol(environment, lambda query: answer) == protocol
