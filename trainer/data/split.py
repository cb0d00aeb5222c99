"""A seeded, stratified split: a pure function of (seed, class, the order of its paths)."""

import random
from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.seeds import derive_seed

Images = dict[str, list[str]]
"""Class -> the paths of its images."""


def stratified_split(
    images: Mapping[str, Sequence[str]], fraction: float, *, seed: int, purpose: Literal["val", "test"]
) -> tuple[Images, Images]:
    """Return (the images left, the images cut out), each in the order given.

    Which are cut out depends on the paths' order alone, not on where their folder lies. Each class keeps
    one image at least, so one of a single image gives none.
    """
    counts = shares({name: len(paths) for name, paths in images.items()}, fraction, seed=seed)
    left: Images = {}
    cut: Images = {}
    for name, paths in images.items():
        places = sorted(range(len(paths)), key=paths.__getitem__)
        random.Random(derive_seed(f"split {purpose} {name}", seed)).shuffle(places)
        chosen = set(places[: counts[name]])
        left[name] = [path for place, path in enumerate(paths) if place not in chosen]
        cut[name] = [path for place, path in enumerate(paths) if place in chosen]
    return left, cut


def shares(counts: Mapping[str, int], fraction: float, *, seed: int) -> dict[str, int]:
    """Return how many of each class's `counts` images make up `fraction` of them all.

    Rounded down, but to 1 from a half on; then those whose lost part is largest get one more, until the
    total is the fraction of all images (Hamilton's method of largest remainders). Classes of equal
    remainder take their turn in a seeded order. No class gives its last image.
    """
    quotas = {name: count * fraction for name, count in counts.items()}
    given = {
        name: min(max(int(quota), int(quota >= 0.5)), counts[name] - 1) for name, quota in quotas.items()
    }
    order = sorted(counts)
    random.Random(derive_seed("split turns", seed)).shuffle(order)
    order.sort(key=lambda name: given[name] - quotas[name])
    wanted = max(1, round(sum(counts.values()) * fraction)) - sum(given.values())
    for name in [name for name in order if given[name] < counts[name] - 1][: max(0, wanted)]:
        given[name] += 1
    return given
