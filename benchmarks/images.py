"""JPEG files for benchmarks, which take as long to decode as photographs."""

import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = (500, 375)
SIDES = (4, 16, 64, 250, 500)
"""Widths of the noise images that are added up [pixels]."""
TINTS = {"a": (24, 0, -24), "b": (-24, 0, 24)}
"""Class -> color that is added to its images, so that a model can learn to tell them apart."""
PARALLEL_FROM = 512
"""Number of images from which several processes draw."""


def write_photographs(folder: Path, *, train: int, val: int = 64, seed: int = 0, copies: int = 1) -> Path:
    """Write an image folder of two classes, JPEG files of 500 x 375 pixels; return the folder.

    The images have detail at every scale, no chroma subsampling and about 120 KB, and take as long to decode as the
    photographs of this size in the ants and bees dataset (median ratio of the times 1.0).

    Args:
        folder: where to write `train/a`, `train/b`, `val/a` and `val/b`.
        train: number of drawn training images.
        val: number of drawn validation images.
        seed: seed of all images.
        copies: number of files per drawn training image, which are hard links.

    """
    paths = []
    for split, count in (("train", train), ("val", val)):
        for name in TINTS:
            (folder / split / name).mkdir(parents=True)
            paths += [folder / split / name / f"{number:05}.jpg" for number in range(count // len(TINTS))]
    draw = partial(_write, seed=seed)
    if len(paths) < PARALLEL_FROM:
        for number, path in enumerate(paths):
            draw(number, path)
    else:
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(draw, range(len(paths)), paths, chunksize=16))
    for path in paths:
        if path.parent.parent.name == "train":
            for number in range(1, copies):
                path.with_name(f"{path.stem}-{number}.jpg").hardlink_to(path)
    return folder


def _write(number: int, path: Path, *, seed: int) -> None:
    random = np.random.default_rng([seed, number])
    pixels = np.zeros((SIZE[1], SIZE[0], 3)) + TINTS[path.parent.name]
    for side in SIDES:
        noise = random.normal(0, 45 * (4 / side) ** 0.3, (max(1, side * SIZE[1] // SIZE[0]), side, 3))
        scaled = Image.fromarray(np.clip(noise + 128, 0, 255).astype(np.uint8)).resize(SIZE)
        pixels += np.asarray(scaled, dtype=float) - 128
    image = Image.fromarray(np.clip(pixels + 128, 0, 255).astype(np.uint8))
    image.save(path, quality=85, subsampling="4:4:4")
