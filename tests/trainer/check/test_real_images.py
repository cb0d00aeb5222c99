"""Real photographs and pretrained weights (shared data): planted near-duplicates and label errors are found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.check.planted import EDITS
from trainer.check.embeddings import embed, load_embedder
from trainer.check.inspection import inspect
from trainer.check.label_errors import score_labels
from trainer.check.near_duplicates import find_by_embeddings
from trainer.check.perceptual_hash import find_near_duplicates
from trainer.config.sections.data import DataConfig

pytestmark = [pytest.mark.soak, pytest.mark.shared]
WEIGHTS = "squeezenet1_1-imagenet1k-fp16.safetensors"


def test_planted_near_duplicates_and_flipped_labels_of_ants_and_bees(shared: Path, tmp_path: Path) -> None:
    """The figures of docs/check.md, for one copy of each photograph."""
    random, edits = np.random.default_rng(0), list(EDITS.items())
    originals = sorted((shared / "data" / "hymenoptera").rglob("*.jpg"))
    for number, path in enumerate(originals):
        kind, edit = edits[number % len(edits)]
        folder = tmp_path / "data" / "train" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{path.stem}.jpg")
        with Image.open(path) as image:
            edit(image.convert("RGB"), random).save(folder / f"{path.stem}__{kind}.jpg", quality=60)
    inspection = inspect(DataConfig(root=str(tmp_path / "data")), workers=2, near=False)
    images, digests = inspection.listing.images, [facts.digest for facts in inspection.table.facts]
    embedder = load_embedder("squeezenet1_1", weights=str(shared / "weights" / WEIGHTS), device="cpu")
    features = embed(embedder, [image.path for image in images], digests, cache=tmp_path)

    stems = [Path(image.path).stem for image in images]
    originals_of = {stem: stem.rpartition("__")[0] for stem in stems if "__" in stem}
    pairs = [*find_by_embeddings(features, inspection.table.thumbnails)]
    pairs += find_near_duplicates(inspection.table.thumbnails)
    named = {frozenset((stems[one], stems[other])) for one, other in pairs}
    planted = {frozenset(item) for item in originals_of.items()}
    wrong = {originals_of.get(stem, stem) for pair in named - planted for stem in pair}
    print(f"near-duplicates: {len(named & planted)} of {len(planted)}; false alarms: {len(wrong)} of {len(originals)}")
    assert len(named & planted) >= 0.95 * len(planted)
    assert len(wrong) <= 0.005 * len(originals)

    rows = np.array([row for row, stem in enumerate(stems) if stem not in originals_of])
    labels = np.array([images[row].label == "bees" for row in rows], dtype=np.int64)
    flipped = random.permutation(len(rows))[: round(0.05 * len(rows))]
    labels[flipped] = 1 - labels[flipped]
    scores = score_labels(features[rows], labels.tolist(), range(len(rows)), seed=0)
    top = scores.ranking[: round(0.1 * len(rows))]
    print(f"label errors: {np.isin(flipped, top).sum()} of {len(flipped)} in the top {len(top)} of {len(rows)}")
    assert np.isin(flipped, top).mean() >= 0.7
