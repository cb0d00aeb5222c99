"""Recall and false alarms of the duplicate search on 1,000 images; prints them (`pytest -m soak -s`)."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.check.planted import burst, plant_copies
from trainer.check.duplicates import DisjointSets, find_exact
from trainer.check.images import read_images
from trainer.check.inspection import find_near
from trainer.data import synthetic

CLEAN, OF_EACH = 1000, 160


def quarters_of_photographs(shared: Path, folder: Path) -> list[Path]:
    """Write the four quarters of each photograph, which show different things."""
    paths: list[Path] = []
    folder.mkdir()
    for photograph in sorted((shared / "data" / "hymenoptera").rglob("*.jpg")):
        with Image.open(photograph) as opened:
            image = opened.convert("RGB")
        width, height = image.width // 2, image.height // 2
        for number, (x, y) in enumerate(((0, 0), (width, 0), (0, height), (width, height))):
            paths.append(folder / f"{photograph.stem}-{number}.jpg")
            image.crop((x, y, x + width, y + height)).save(paths[-1], quality=92)
    return paths


def synthetic_shapes(_: Path, folder: Path) -> list[Path]:
    synthetic.generate("source", folder, seed=0)
    return sorted(folder.rglob("*.jpg"))


def find_pairs(paths: list[Path]) -> DisjointSets:
    table = read_images([str(path) for path in paths], workers=2)
    digests = [facts.digest for facts in table.facts]
    sets = DisjointSets(len(paths))
    for one, other in (*find_exact(digests), *find_near(table.thumbnails, digests)):
        sets.merge(one, other)
    return sets


@pytest.mark.soak
@pytest.mark.shared
@pytest.mark.parametrize("source", [quarters_of_photographs, synthetic_shapes])
def test_recall_and_false_alarms(source: Callable[[Path, Path], list[Path]], shared: Path, tmp_path: Path) -> None:
    clean = source(shared, tmp_path / "clean")[:CLEAN]
    assert len(clean) == CLEAN
    alone = find_pairs(clean)
    alarms = sorted(position for group in alone.groups() for position in group)
    print(f"\n{source.__name__}: {len(alarms)} of {CLEAN} clean images in a group")
    for group in alone.groups():
        print("  ", *(clean[position].name for position in group))
    planted = plant_copies(clean, tmp_path / "copies", of_each=OF_EACH)
    copies = {copy: (kind, original) for kind, pairs in planted.items() for copy, original in pairs.items()}
    positions = {path: position for position, path in enumerate([*clean, *copies])}
    sets = find_pairs([*clean, *copies])
    recall = {}
    for kind in planted:
        pairs = [(copy, original) for copy, (other, original) in copies.items() if other == kind]
        found = sum(sets.find(positions[copy]) == sets.find(positions[original]) for copy, original in pairs)
        recall[kind] = found / len(pairs)
        print(f"  {kind}: {found} of {len(pairs)} found")
    assert recall["exact"] == 1.0
    assert min(recall.values()) >= 0.95
    assert len(alarms) <= 0.005 * CLEAN


@pytest.mark.soak
@pytest.mark.shared
def test_the_frames_of_a_burst_are_one_group(shared: Path, tmp_path: Path) -> None:
    bursts, frames, random = 200, 5, np.random.default_rng(0)
    paths = []
    for number, original in enumerate(quarters_of_photographs(shared, tmp_path / "clean")[: 5 * bursts : 5]):
        with Image.open(original) as image:
            for position, frame in enumerate(burst(image.convert("RGB"), random, frames=frames)):
                paths.append(tmp_path / f"{number}-{position}.jpg")
                frame.save(paths[-1], quality=85)
    sets = find_pairs(paths)
    groups = [sets.find(position) for position in range(len(paths))]
    largest = [max(Counter(groups[first : first + frames]).values()) for first in range(0, len(paths), frames)]
    mixed = sum(len({position // frames for position in group}) > 1 for group in sets.groups())
    print(
        f"\nbursts whose {frames} frames are one group: {largest.count(frames)} of {bursts}; groups of several: {mixed}"
    )
    assert largest.count(frames) >= 0.95 * bursts
    assert mixed <= 0.005 * bursts
