"""Two small tasks of drawn pictures, so that transfer can be shown offline: real JPEG files in image folders.

Every picture is one shape filled with one pattern, in random colours, at a random place, size and angle,
before a cluttered background. A class is a pair (shape, pattern). The source task has most of the pairs and
many pictures; the target task has the pairs that the source has never shown, and few pictures: nothing of
its classes is known, all of its visual vocabulary is.
"""

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from trainer.seeds import derive_seed

VERSION = 1
"""Raised whenever the pictures change: drawn folders of another version are not used."""

SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")
PATTERNS = ("checked", "dotted", "plain", "striped")

_Field = NDArray[Any]


@dataclass(frozen=True)
class Task:
    """A data set to draw."""

    classes: tuple[tuple[str, str], ...]
    """(pattern, shape); a class is named `pattern-shape`."""
    pictures: Mapping[str, int]
    """Part of the data -> pictures of each class."""


_UNSEEN = (("checked", "star"), ("dotted", "cross"), ("plain", "triangle"), ("striped", "ring"))
_SEEN = tuple((p, s) for p in PATTERNS for s in SHAPES if (p, s) not in _UNSEEN)

TASKS: Mapping[str, Task] = {
    "source": Task(_SEEN, {"train": 60, "test": 6}),
    "target": Task(_UNSEEN, {"train": 10, "test": 40}),
}


def draw(task: str, folder: Path, *, seed: int) -> None:
    """Draw a task's pictures into `folder`/<part>/<class>/, unless that was done before.

    A folder that exists is whole: it is put in place under its name when its last picture is written.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for part, count in TASKS[task].pictures.items():
            for pattern, shape in TASKS[task].classes:
                name = f"{pattern}-{shape}"
                (unfinished / part / name).mkdir(parents=True)
                for i in range(count):
                    random = np.random.default_rng(derive_seed(f"picture {task} {part} {name}", seed, i))
                    picture(shape, pattern, random).save(unfinished / part / name / f"{i:04}.jpg", quality=90)
        unfinished.chmod(0o755)
        try:
            unfinished.rename(folder)
        except OSError:
            if not folder.is_dir():  # another run has drawn the same in the meantime
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def picture(shape: str, pattern: str, random: np.random.Generator) -> Image.Image:
    """Return one RGB picture, 72 to 96 pixels wide and high."""
    width, height = random.integers(72, 97, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    canvas = _background(x, y, random)
    radius = min(width, height) * random.uniform(0.32, 0.46)
    centre = [random.uniform(0.9 * radius, side - 0.9 * radius) for side in (width, height)]
    u, v = _turned(x - centre[0], y - centre[1], random.uniform(-0.5, 0.5))
    cover = _cover(_distance(shape, u / radius, v / radius) * radius)
    period = random.uniform(9.0, 13.0)
    s, t = _turned(x, y, random.uniform(0, 2 * np.pi))
    weave = _pattern(pattern, s * 2 * np.pi / period, t * 2 * np.pi / period)
    dark, light = _two_colours(random)
    ink = dark + (light - dark) * weave[..., None]
    canvas += (ink - canvas) * cover[..., None]
    canvas += random.normal(0, 4, canvas.shape).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _background(x: _Field, y: _Field, random: np.random.Generator) -> _Field:
    """Return a gradient of two colours [H, W, 3] under a few faint strokes, which are nobody's shape."""
    here, there = random.uniform(40, 215, (2, 3)).astype(np.float32)
    s, _ = _turned(x / x.max() - 0.5, y / y.max() - 0.5, random.uniform(0, 2 * np.pi))
    canvas: _Field = here + (there - here) * np.clip(s + 0.5, 0, 1)[..., None]
    for _ in range(random.integers(2, 6)):
        s, _ = _turned(
            x - random.uniform(0, x.max()), y - random.uniform(0, y.max()), random.uniform(0, np.pi)
        )
        stroke = 0.6 * _cover(np.abs(s) - random.uniform(0.5, 2.0))
        canvas += (random.uniform(40, 215, 3).astype(np.float32) - canvas) * stroke[..., None]
    return canvas


def _two_colours(random: np.random.Generator) -> tuple[_Field, _Field]:
    """Return two colours [3] of any hue, far enough apart in brightness for a pattern to be seen."""
    dark = random.uniform(0, 110, 3)
    light = random.uniform(150, 255, 3)
    pair = (dark, light) if random.random() < 0.5 else (light, dark)
    return pair[0].astype(np.float32), pair[1].astype(np.float32)


def _turned(x: _Field, y: _Field, angle: float) -> tuple[_Field, _Field]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _cover(distance: _Field) -> _Field:
    """Return how much of each pixel lies inside an outline: 1 one half pixel within it, 0 one half without."""
    return np.clip(0.5 - distance, 0, 1)


def _distance(shape: str, u: _Field, v: _Field) -> _Field:
    """Return roughly the distance to the shape's outline in radii, negative inside; its centre is at (0, 0)."""
    length = np.hypot(u, v)
    if shape == "circle":
        return length - 0.85
    if shape == "ring":
        return np.abs(length - 0.68) - 0.24
    if shape == "square":
        return np.maximum(np.abs(u), np.abs(v)) - 0.72
    if shape == "cross":
        a, b = np.abs(u), np.abs(v)
        return np.minimum(np.maximum(a - 0.9, b - 0.3), np.maximum(a - 0.3, b - 0.9))
    if shape == "triangle":
        return np.maximum(np.abs(u) * np.float32(np.sqrt(0.75)) - v * 0.5, v) - 0.5
    # A star: the outline's radius swings evenly between its five tips (0.98) and the notches between them (0.26).
    swing: _Field = 1 - 2 * np.arccos(np.cos(5 * np.arctan2(u, -v))) / np.float32(np.pi)
    return length - (0.62 + 0.36 * swing)


def _pattern(pattern: str, s: _Field, t: _Field) -> _Field:
    """Return the share of the second colour at phases (s, t): 0 or 1, soft at the edges."""
    if pattern == "plain":
        return np.zeros_like(s)
    wave = {
        "striped": np.sin(s),
        "checked": 1.5 * np.sin(s) * np.sin(t),
        "dotted": np.cos(s) + np.cos(t) - 0.7,
    }[pattern]
    return np.clip(0.5 + 2 * wave, 0, 1)
