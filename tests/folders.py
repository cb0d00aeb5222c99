"""Small folders of real image files."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image


def noise_image(seed: int, *, size: tuple[int, int] = (40, 30)) -> Image.Image:
    """Return noise over a random color; every seed gives another image."""
    random = np.random.default_rng(seed)
    base = random.integers(0, 256, (1, 1, 3))
    noise = random.integers(-40, 41, (size[1], size[0], 3))
    return Image.fromarray(np.clip(base + noise, 0, 255).astype(np.uint8))


def image_folder(root: Path, splits: Mapping[str, Mapping[str, int]], *, seed: int = 0) -> Path:
    """Write `root/SPLIT/CLASS/NNN.png` for {split: {class: count}}; the split "" has no folder of its own."""
    number = seed * 100_000
    for split, classes in splits.items():
        for name, count in classes.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                number += 1
                noise_image(number).save(folder / f"{i:03}.png")
    return root
