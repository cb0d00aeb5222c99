"""Seeded, stratified splits: a pure function of the seed, the class names and the sorted paths."""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import compress
from operator import not_
from typing import Literal

from trainer.seeds import derive_seed

PathsByClass = dict[str, list[str]]
"""Class -> paths of its images."""
_MAX_PASSES = 10
_MIN_GAIN = 1e-12
"""Smallest decrease of the error for which a group changes its side; less is rounding."""


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
        _shuffle(positions, derive_seed(f"split {purpose} {name}", seed))
        is_held_out = bytearray(len(paths))
        for position in positions[: counts[name]]:
            is_held_out[position] = True
        remaining[name] = [*compress(paths, map(not_, is_held_out))]
        held_out[name] = [*compress(paths, is_held_out)]
    return remaining, held_out


def _shuffle(positions: list[int], seed: int) -> None:
    """Shuffle a list as `random.Random(seed).shuffle` does, in half the time."""
    getrandbits = random.Random(seed).getrandbits
    for last in range(len(positions) - 1, 0, -1):
        bits = (last + 1).bit_length()
        while (other := getrandbits(bits)) > last:
            pass
        positions[last], positions[other] = positions[other], positions[last]


def grouped_split(
    images: Mapping[str, Sequence[str]],
    groups: Mapping[str, str],
    fraction: float,
    *,
    seed: int,
    purpose: Literal["val", "test"],
) -> tuple[PathsByClass, PathsByClass]:
    """Return (remaining images, held-out images) so that all images of a group are on one side.

    The held-out groups are chosen so that the fraction of each class is close to `fraction`, as in scikit-learn's
    StratifiedGroupKFold. Each class keeps at least one image. An image that is not in `groups` (path -> group) is a
    group of its own. Without groups, this is `stratified_split`.
    """
    if not groups:
        return stratified_split(images, fraction, seed=seed, purpose=purpose)
    counts: dict[str, Counter[str]] = {}
    for name, paths in images.items():
        for path in paths:
            counts.setdefault(groups.get(path, path), Counter())[name] += 1
    totals = {name: len(paths) for name, paths in images.items()}
    targets = split_counts(totals, fraction, seed=seed)
    held_out = _select_groups(counts, targets, totals, derive_seed(f"split {purpose} groups", seed))
    return (
        {name: [path for path in paths if groups.get(path, path) not in held_out] for name, paths in images.items()},
        {name: [path for path in paths if groups.get(path, path) in held_out] for name, paths in images.items()},
    )


def _select_groups(
    counts: Mapping[str, Counter[str]], targets: Mapping[str, int], totals: Mapping[str, int], seed: int
) -> set[str]:
    """Return the groups to hold out, by coordinate descent on the sum of squared errors of the classes.

    Groups are visited in a seeded order. A group changes its side if that brings the held-out fractions of its classes
    closer to their targets, until no group does. A class whose groups are all too large still holds out one of them.

    Args:
        counts: group -> class -> number of its images.
        targets: class -> number of images to hold out.
        totals: class -> number of images.
        seed: of the order.

    """
    order = sorted(counts)
    random.Random(seed).shuffle(order)
    held_out: set[str] = set()
    missing = dict(targets)  # class -> target minus the number of held-out images

    def gain(group: str) -> float:
        """Return the decrease of the error if the group changes its side; -inf if a class would have no image left."""
        sign = -1 if group in held_out else 1
        decrease = 0.0
        for name, count in counts[group].items():
            if sign > 0 and totals[name] - targets[name] + missing[name] <= count:
                return -math.inf
            decrease += (missing[name] ** 2 - (missing[name] - sign * count) ** 2) / totals[name] ** 2
        return decrease

    def change_side(group: str) -> None:
        sign = -1 if group in held_out else 1
        held_out.symmetric_difference_update((group,))
        for name, count in counts[group].items():
            missing[name] -= sign * count

    for _ in range(_MAX_PASSES):
        before = set(held_out)
        for group in order:
            if gain(group) > _MIN_GAIN:
                change_side(group)
        if held_out == before:
            break
    for name in sorted(totals):
        if targets[name] and missing[name] == targets[name]:
            best = max((group for group in order if name in counts[group]), key=gain)
            if gain(best) > -math.inf:
                change_side(best)
    return held_out


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
