"""JPEG files for benchmarks, which take as long to decode as photographs."""

from pathlib import Path

import numpy as np
from PIL import Image


def write_photographs(folder: Path, *, train: int, seed: int = 0) -> Path:
    """Write JPEG files of 500 x 375 pixels with detail at every scale; they take as long to decode as photographs."""
    random = np.random.default_rng(seed)
    for split, count in (("train", train), ("val", 4)):
        for name in ("a", "b"):
            (folder / split / name).mkdir(parents=True)
            for i in range(count // 2):
                pixels = np.zeros((375, 500, 3))
                for side in (4, 16, 64, 375):
                    noise = random.normal(0, 45 * (4 / side) ** 0.3, (side, side, 3))
                    scaled = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8)).resize((500, 375))
                    pixels += np.asarray(scaled, dtype=float) - 128
                image = Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))
                image.save(folder / split / name / f"{i:03}.jpg", quality=85)
    return folder
