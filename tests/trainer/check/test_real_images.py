"""Real photographs and pretrained weights (shared data): planted near-duplicates and label errors are found."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.trainer.check.planted import EDITS
from trainer.check.embeddings import embed, load_embedder
from trainer.check.inspection import Inspection, inspect
from trainer.check.label_errors import score_labels
from trainer.check.near_duplicates import find_by_embeddings
from trainer.check.perceptual_hash import find_near_duplicates
from trainer.config.sections.data import DataConfig

pytestmark = [pytest.mark.soak, pytest.mark.shared]
MODELS = {
    "squeezenet1_1": "squeezenet1_1-imagenet1k-fp16.safetensors",
    "timm/tf_efficientnet_lite0": "tf_efficientnet_lite0-imagenet1k-fp16.safetensors",
}
COPY = "__"
"""Separates the name of an image from the edit of its copy."""


@pytest.fixture(scope="module")
def inspection(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Inspection:
    """Return the photographs of ants and bees, with one edited copy of each."""
    root, random, edits = tmp_path_factory.mktemp("real") / "data", np.random.default_rng(0), list(EDITS.items())
    for number, path in enumerate(sorted((shared / "data" / "hymenoptera").rglob("*.jpg"))):
        kind, edit = edits[number % len(edits)]
        folder = root / "train" / path.parent.name
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / f"{path.stem}.jpg")
        with Image.open(path) as image:
            edit(image.convert("RGB"), random).save(folder / f"{path.stem}{COPY}{kind}.jpg", quality=60)
    return inspect(DataConfig(root=str(root)), workers=2, near=False)


@pytest.fixture(scope="module", params=MODELS)
def features(
    request: pytest.FixtureRequest, inspection: Inspection, shared: Path, tmp_path_factory: pytest.TempPathFactory
) -> np.ndarray:
    print(f"\n{request.param}")
    embedder = load_embedder(request.param, weights=str(shared / "weights" / MODELS[request.param]), device="cpu")
    paths = [image.path for image in inspection.listing.images]
    digests = [facts.digest for facts in inspection.table.facts]
    return embed(embedder, paths, digests, cache=tmp_path_factory.mktemp("cache"))


def test_planted_near_duplicates(inspection: Inspection, features: np.ndarray) -> None:
    stems = [Path(image.path).stem for image in inspection.listing.images]
    originals_of = {stem: stem.rpartition(COPY)[0] for stem in stems if COPY in stem}
    planted = {frozenset(item) for item in originals_of.items()}
    by_hash = {*find_near_duplicates(inspection.table.thumbnails)}
    by_features = {*find_by_embeddings(features, inspection.table.thumbnails)}
    for name, pairs in (("hash", by_hash), ("features", by_features), ("both", by_hash | by_features)):
        named = {frozenset((stems[one], stems[other])) for one, other in pairs}
        wrong = {originals_of.get(stem, stem) for pair in named - planted for stem in pair}
        print(f"  {name}: {len(named & planted)} of {len(planted)} copies; {len(wrong)} clean images in a wrong group")
    assert len(named & planted) >= 0.95 * len(planted)
    assert len(wrong) <= 0.005 * len(planted)


def test_flipped_labels(inspection: Inspection, features: np.ndarray) -> None:
    images = inspection.listing.images
    rows = np.array([row for row, image in enumerate(images) if COPY not in image.path], dtype=np.int64)
    given = np.array([images[row].label == "bees" for row in rows], dtype=np.int64)
    shares = []
    for seed in range(5):
        labels, flipped = given.copy(), np.random.default_rng(seed).permutation(len(rows))[: round(0.05 * len(rows))]
        labels[flipped] = 1 - labels[flipped]
        scores = score_labels(features[rows], labels.tolist(), range(len(rows)), seed=0)
        shares.append(np.isin(flipped, scores.ranking[: round(0.1 * len(rows))]).mean())
        right = np.isin(scores.errors, flipped)
        print(
            f"  seed {seed}: {shares[-1]:.0%} of {len(flipped)} flipped labels in the first 10 %; {len(right)} named "
            f"as errors, {right.sum()} of them flipped; probe {scores.accuracy:.1%}"
        )
    print(f"  mean {np.mean(shares):.0%}, {min(shares):.0%} to {max(shares):.0%}")
    assert min(shares) >= 0.7
