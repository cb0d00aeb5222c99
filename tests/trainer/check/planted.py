"""Images with planted copies: exact, re-encoded, resized, cropped and mirrored."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

Edit = Callable[[Image.Image, np.random.Generator], Image.Image]


def picture(seed: int, *, size: tuple[int, int] = (200, 150)) -> Image.Image:
    """Return smooth random colors with a few shapes; every seed gives another picture."""
    random = np.random.default_rng(seed)
    colors = Image.fromarray(random.integers(0, 256, (7, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    for _ in range(4):
        x, y = random.integers(0, size[0] - 40), random.integers(0, size[1] - 40)
        colors.paste(tuple(random.integers(0, 256, 3).tolist()), (x, y, x + 40, y + int(random.integers(10, 40))))
    return colors


def crop(image: Image.Image, random: np.random.Generator) -> Image.Image:
    """Remove 5 % of the width and of the height, at random sides."""
    width, height = round(0.95 * image.width), round(0.95 * image.height)
    left, top = random.integers(0, image.width - width + 1), random.integers(0, image.height - height + 1)
    return image.crop((left, top, left + width, top + height))


EDITS: dict[str, Edit] = {
    "encoded": lambda image, _: image,  # saved at another quality
    "resized": lambda image, _: image.resize((image.width // 2, image.height // 2)),
    "cropped": crop,
    "mirrored": lambda image, _: image.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "mirrored-cropped": lambda image, random: crop(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), random),
}


def burst(image: Image.Image, random: np.random.Generator, *, frames: int) -> list[Image.Image]:
    """Return frames of a camera that moves by up to 1 % of a side between two, in changing light."""
    size, position = np.array(image.size), np.full(2, 0.05)
    shown: list[Image.Image] = []
    for _ in range(frames):
        position = (position + random.uniform(-0.01, 0.01, 2)).clip(0, 0.1)
        left, top, right, bottom = (int(value) for value in (*(position * size), *((position + 0.9) * size)))
        pixels = np.asarray(image.crop((left, top, right, bottom))) * random.uniform(0.9, 1.1)
        shown.append(Image.fromarray(pixels.clip(0, 255).astype(np.uint8)))
    return shown


def plant_copies(originals: list[Path], target: Path, *, of_each: int, seed: int = 0) -> dict[str, dict[Path, Path]]:
    """Write copies of `of_each` originals for each edit, and as many exact ones, to a folder.

    Returns:
        Kind -> copy -> original.

    """
    random = np.random.default_rng(seed)
    target.mkdir(parents=True, exist_ok=True)
    planted: dict[str, dict[Path, Path]] = {}
    for number, kind in enumerate(("exact", *EDITS)):
        for position, original in enumerate(originals[number * of_each : (number + 1) * of_each]):
            copy = target / f"{kind}-{position}.jpg"
            if kind == "exact":
                shutil.copyfile(original, copy)
            else:
                with Image.open(original) as image:
                    EDITS[kind](image.convert("RGB"), random).save(copy, quality=int(random.integers(40, 80)))
            planted.setdefault(kind, {})[copy] = original
    return planted
