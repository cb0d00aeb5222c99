"""Seeded, stratified splits: a pure function of the seed, the class names and the sorted paths."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Literal

from trainer.seeds import derive_seed

PathsByClass = dict[str, list[str]]
"""Class -> paths of its images."""


def stratified_split(
    images: Mapping[str, Sequence[str]], fraction: float, *, seed: int, purpose: Literal["val", "test"]
) -> tuple[PathsByClass, PathsByClass]:
    """Return (remaining images, held-out images), each in the given order.

    The split depends on the order of the sorted paths only, so it does not change if the dataset is moved. Each
    class keeps at least one image; a class with a single image has none in the held-out part.
    """
    counts = split_counts({name: len(paths) for name, paths in images.items()}, fraction, seed=seed)
    remaining: PathsByClass = {}
    held_out: PathsByClass = {}
    for name, paths in images.items():
        positions = sorted(range(len(paths)), key=paths.__getitem__)
        random.Random(derive_seed(f"split {purpose} {name}", seed)).shuffle(positions)
        selected = set(positions[: counts[name]])
        remaining[name] = [path for position, path in enumerate(paths) if position not in selected]
        held_out[name] = [path for position, path in enumerate(paths) if position in selected]
    return remaining, held_out


def grouped_split(
    images: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    fraction: float,
    *,
    seed: int,
    purpose: Literal["val", "test"],
) -> tuple[PathsByClass, PathsByClass]:
    """Return (remaining images, held-out images) so that all images of a group are on one side.

    Each group counts as one image of the class that most of its images have; `fraction` is that of the groups. An image
    that is not in `groups` (path -> group) is a group of its own, so without groups this is `stratified_split`.
    """
    if not groups:
        return stratified_split(images, fraction, seed=seed, purpose=purpose)
    classes: dict[str, Counter[str]] = {}
    for name, paths in images.items():
        for path in paths:
            classes.setdefault(groups.get(path, path), Counter())[name] += 1
    units: PathsByClass = {}
    for group, counts in classes.items():
        units.setdefault(max(sorted(counts), key=counts.__getitem__), []).append(group)
    _, held_out_units = stratified_split(units, fraction, seed=seed, purpose=purpose)
    held_out = {group for selected in held_out_units.values() for group in selected}
    return (
        {name: [path for path in paths if groups.get(path, path) not in held_out] for name, paths in images.items()},
        {name: [path for path in paths if groups.get(path, path) in held_out] for name, paths in images.items()},
    )


def split_counts(counts: Mapping[str, int], fraction: float, *, seed: int) -> dict[str, int]:
    """Return how many images of each class are held out, so that the total is `fraction` of all images.

    Uses the largest remainder method (Hamilton). The quota of each class is rounded down, except that quotas from
    0.5 to 1 become 1. The classes with the largest remainders then hold out one more until the total is reached.
    Ties are broken in a seeded order. No class holds out its last image.
    """
    quotas = {name: count * fraction for name, count in counts.items()}
    held_out = {name: min(max(int(quota), int(quota >= 0.5)), counts[name] - 1) for name, quota in quotas.items()}
    order = sorted(counts)
    random.Random(derive_seed("split turns", seed)).shuffle(order)
    order.sort(key=lambda name: held_out[name] - quotas[name])
    missing = max(1, round(sum(counts.values()) * fraction)) - sum(held_out.values())
    for name in [name for name in order if held_out[name] < counts[name] - 1][: max(0, missing)]:
        held_out[name] += 1
    return held_out
