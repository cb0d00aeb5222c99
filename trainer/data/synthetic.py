"""Generate two small synthetic datasets that show transfer learning offline: JPEG files in image folders.

Every image shows one shape filled with one pattern, in random colors, at a random position, size and angle, on
a cluttered background. A class is a pair (pattern, shape). The source task has most of the pairs and many
images. The target task has the other pairs and few images: its classes are new, its shapes and patterns are not.
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
"""Increment it whenever the images change: cached folders of another version are not used."""

SHAPES = ("circle", "cross", "ring", "square", "star", "triangle")
PATTERNS = ("checked", "dotted", "plain", "striped")

_Field = NDArray[Any]
"""Values per pixel, float32 [H, W] or [H, W, 3]."""


@dataclass(frozen=True)
class Task:
    """Classes and number of images of a synthetic dataset."""

    classes: tuple[tuple[str, str], ...]
    """(pattern, shape); the class is named `pattern-shape`."""
    images_per_class: Mapping[str, int]
    """Split (train or test) -> number of images of each class."""


_UNSEEN = (("checked", "star"), ("dotted", "cross"), ("plain", "triangle"), ("striped", "ring"))
_SEEN = tuple((p, s) for p in PATTERNS for s in SHAPES if (p, s) not in _UNSEEN)

TASKS: Mapping[str, Task] = {
    "source": Task(_SEEN, {"train": 60, "test": 6}),
    "target": Task(_UNSEEN, {"train": 10, "test": 40}),
}


def generate(task: str, folder: Path, *, seed: int) -> None:
    """Write the images of a task to `folder`/<split>/<class>/, unless the folder exists.

    The images are written to a temporary folder that is renamed at the end, so an existing folder is complete.
    """
    if folder.is_dir():
        return
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        for split, count in TASKS[task].images_per_class.items():
            for pattern, shape in TASKS[task].classes:
                name = f"{pattern}-{shape}"
                (temporary / split / name).mkdir(parents=True)
                for i in range(count):
                    rng = np.random.default_rng(derive_seed(f"picture {task} {split} {name}", seed, i))
                    make_image(shape, pattern, rng).save(temporary / split / name / f"{i:04}.jpg", quality=90)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process has written the same images in the meantime
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def make_image(shape: str, pattern: str, rng: np.random.Generator) -> Image.Image:
    """Return one RGB image, 72 to 96 pixels wide and high."""
    width, height = rng.integers(72, 97, 2)
    y, x = np.mgrid[:height, :width].astype(np.float32)
    canvas = _background(x, y, rng)
    radius = min(width, height) * rng.uniform(0.32, 0.46)
    center = [rng.uniform(0.9 * radius, side - 0.9 * radius) for side in (width, height)]
    u, v = _rotate(x - center[0], y - center[1], rng.uniform(-0.5, 0.5))
    coverage = _coverage(_distance(shape, u / radius, v / radius) * radius)
    period = rng.uniform(9.0, 13.0)
    s, t = _rotate(x, y, rng.uniform(0, 2 * np.pi))
    pattern_values = _pattern(pattern, s * 2 * np.pi / period, t * 2 * np.pi / period)
    first, second = _two_colors(rng)
    fill = first + (second - first) * pattern_values[..., None]
    canvas += (fill - canvas) * coverage[..., None]
    canvas += rng.normal(0, 4, canvas.shape).astype(np.float32)
    return Image.fromarray(np.clip(canvas, 0, 255).astype(np.uint8))


def _background(x: _Field, y: _Field, rng: np.random.Generator) -> _Field:
    """Return a gradient of two colors [H, W, 3] under a few faint strokes, which belong to no shape."""
    start, end = rng.uniform(40, 215, (2, 3)).astype(np.float32)
    s, _ = _rotate(x / x.max() - 0.5, y / y.max() - 0.5, rng.uniform(0, 2 * np.pi))
    canvas: _Field = start + (end - start) * np.clip(s + 0.5, 0, 1)[..., None]
    for _ in range(rng.integers(2, 6)):
        s, _ = _rotate(x - rng.uniform(0, x.max()), y - rng.uniform(0, y.max()), rng.uniform(0, np.pi))
        stroke = 0.6 * _coverage(np.abs(s) - rng.uniform(0.5, 2.0))
        canvas += (rng.uniform(40, 215, 3).astype(np.float32) - canvas) * stroke[..., None]
    return canvas


def _two_colors(rng: np.random.Generator) -> tuple[_Field, _Field]:
    """Return two colors [3] of any hue whose brightness differs enough to show a pattern."""
    dark = rng.uniform(0, 110, 3)
    light = rng.uniform(150, 255, 3)
    pair = (dark, light) if rng.random() < 0.5 else (light, dark)
    return pair[0].astype(np.float32), pair[1].astype(np.float32)


def _rotate(x: _Field, y: _Field, angle: float) -> tuple[_Field, _Field]:
    cos, sin = np.float32(np.cos(angle)), np.float32(np.sin(angle))
    return cos * x + sin * y, cos * y - sin * x


def _coverage(distance: _Field) -> _Field:
    """Return the share of each pixel inside an outline, from its signed distance in pixels (negative inside)."""
    return np.clip(0.5 - distance, 0, 1)


def _distance(shape: str, u: _Field, v: _Field) -> _Field:
    """Return the approximate signed distance to the outline of a shape at (0, 0), in radii; negative inside."""
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
    # A star: the radius of the outline is linear in the angle between five tips (0.98) and five notches (0.26).
    wave: _Field = 1 - 2 * np.arccos(np.cos(5 * np.arctan2(u, -v))) / np.float32(np.pi)
    return length - (0.62 + 0.36 * wave)


def _pattern(pattern: str, s: _Field, t: _Field) -> _Field:
    """Return the weight of the second color at phases (s, t): 0 or 1, soft at the edges."""
    if pattern == "plain":
        return np.zeros_like(s)
    waves = {"striped": np.sin(s), "checked": 1.5 * np.sin(s) * np.sin(t), "dotted": np.cos(s) + np.cos(t) - 0.7}
    return np.clip(0.5 + 2 * waves[pattern], 0, 1)
