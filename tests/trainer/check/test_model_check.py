"""Embeddings, near-duplicates and label errors of a small dataset, by a network with random weights."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import models

from tests.trainer.check.planted import EDITS, picture
from trainer.check import embeddings
from trainer.check.csv_files import write_excluded
from trainer.check.embeddings import Embedder, embed, load_embedder
from trainer.check.inspection import Inspection, inspect, make_result
from trainer.check.model_check import check_with_model
from trainer.config.sections.data import DataConfig
from trainer.data.prepare import exclude_images
from trainer.data.preprocessing import Preprocessing
from trainer.errors import UserError
from trainer.inference.file_logits import BatchLogits
from trainer.model.metadata import ModelMetadata, write_model

COLORS = {"blue": (40, 60, 220), "red": (220, 60, 40)}
OF_EACH = 20
MISLABELED = ("blue/3.jpg", "blue/11.jpg", "red/7.jpg")


def tinted(seed: int, color: tuple[int, int, int]) -> Image.Image:
    return Image.blend(picture(seed), Image.new("RGB", picture(seed).size, color), 0.45)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Write pictures that are tinted by class, some with the color of the other class, and edited copies of some."""
    root, random = tmp_path_factory.mktemp("check") / "data", np.random.default_rng(0)
    for number, name in enumerate(COLORS):
        for split in ("train", "val"):
            (root / split / name).mkdir(parents=True)
        for i in range(OF_EACH):
            shown = name if f"{name}/{i}.jpg" not in MISLABELED else next(other for other in COLORS if other != name)
            tinted(100 * number + i, COLORS[shown]).save(root / "train" / name / f"{i}.jpg", quality=90)
        for i, edit in enumerate(EDITS):
            with Image.open(root / "train" / name / f"{i + 12}.jpg") as image:
                EDITS[edit](image, random).save(root / "val" / name / f"{edit}.jpg", quality=70)
        shutil.copyfile(root / "train" / name / "0.jpg", root / "val" / name / "exact.jpg")
    return DataConfig(root=str(root), cache=str(root.parent / "cache"))


@pytest.fixture(scope="module")
def inspection(data: DataConfig) -> Inspection:
    return inspect(data, workers=1)


@pytest.fixture(scope="module")
def model_file(data: DataConfig) -> Path:
    torch.manual_seed(0)
    model = models.squeezenet1_1(num_classes=2)
    metadata = ModelMetadata(
        version="0",
        architecture="squeezenet1_1",
        classes=("blue", "red"),
        preprocessing=Preprocessing(
            image_size=64, resize_size=64, resize="squash", interpolation="bilinear", mean=(0.5,) * 3, std=(0.25,) * 3
        ),
        source="random",
        metrics={},
    )
    assert data.root is not None
    write_model(path := Path(data.root).parent / "model.safetensors", model.state_dict(), metadata)
    return path


@pytest.fixture(scope="module")
def embedder(model_file: Path) -> Embedder:
    loaded = load_embedder(str(model_file), device="cpu")
    torch.set_num_threads(1)  # the model is small
    return loaded


def names(paths: Sequence[str], data: DataConfig) -> list[str]:
    return [path.removeprefix(f"{data.root}/") for path in paths]


def test_near_duplicates_and_label_errors_are_found(
    data: DataConfig, inspection: Inspection, embedder: Embedder, tmp_path: Path
) -> None:
    assert data.root is not None
    found = check_with_model(inspection, embedder, cache=Path(str(data.cache)), seed=0)
    images = [image.path for image in inspection.listing.images]
    pairs = {tuple(sorted(names([images[one], images[other]], data))) for one, other in found.pairs}
    planted = {
        (f"train/{name}/{i + 12}.jpg", f"val/{name}/{edit}.jpg") for name in COLORS for i, edit in enumerate(EDITS)
    }
    assert pairs <= planted
    assert len(pairs) >= 9, "without the hash, with random weights"
    mislabeled = {f"train/{name}" for name in MISLABELED}
    assert set(names([error.image.path for error in found.label_errors[:3]], data)) == mislabeled
    assert [error.suggested for error in found.label_errors[:3]] == [
        "red" if error.image.label == "blue" else "blue" for error in found.label_errors[:3]
    ]
    result = make_result(inspection, data, found)
    kinds = {finding.kind: finding for finding in result.findings}
    assert kinds["label-errors"].count == len(found.label_errors)
    assert "a linear probe on the features of squeezenet1_1 agrees with" in kinds["label-errors"].message
    assert kinds["leakage"].count == 12
    assert len(result.to_json()["label_errors"]) == len(found.label_errors)

    count = write_excluded(file := tmp_path / "exclude.csv", result, inspection.listing)
    assert inspection.listing.index is not None
    remaining = exclude_images(inspection.listing.index, file)
    copied = {f"train/{name}/{i + 12}.jpg" for name in COLORS for i in range(len(EDITS))} | {
        f"train/{name}/0.jpg" for name in COLORS
    }
    wrong = {name for name in names([error.image.path for error in found.label_errors], data) if "train/" in name}
    assert {*names([path for path, _ in remaining.train], data)}.isdisjoint(copied | wrong)
    assert (count, len(remaining.train)) == (len(copied | wrong), 2 * OF_EACH - len(copied | wrong))
    assert remaining.test == inspection.listing.index.test, "what is measured stays the same"


def test_embeddings_are_kept_and_found_by_the_content_of_the_file(
    data: DataConfig, inspection: Inspection, embedder: Embedder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [image.path for image in inspection.listing.images[:10]]
    digests = [facts.digest for facts in inspection.table.facts[:10]]
    shown: list[tuple[int, int]] = []
    first = embed(embedder, paths, digests, cache=tmp_path, on_progress=lambda *numbers: shown.append(numbers))
    assert (first.shape, first.dtype, shown[-1]) == ((10, 512), np.float32, (10, 10))
    computed: list[str] = []

    class Recorded(embeddings.FileLogits):
        def __call__(self, paths: Sequence[str]) -> Iterator[BatchLogits]:
            computed.extend(paths)
            return super().__call__(paths)

    monkeypatch.setattr(embeddings, "FileLogits", Recorded)
    assert np.array_equal(embed(embedder, paths, digests, cache=tmp_path), first)
    assert computed == []
    changed = [*digests[:9], "0" * 64]
    again = embed(embedder, paths, changed, cache=tmp_path)
    assert computed == paths[9:]
    assert np.allclose(again, first, atol=1e-5)
    (file,) = (tmp_path / "embeddings").iterdir()
    file.write_bytes(file.read_bytes()[:100])  # damaged
    embed(embedder, paths, digests, cache=tmp_path)
    assert len(computed) == 11


def test_the_model_may_be_a_name_with_weights(model_file: Path, embedder: Embedder, tmp_path: Path) -> None:
    torch.manual_seed(1)
    save_file(models.squeezenet1_1().state_dict(), weights := tmp_path / "weights.safetensors")
    named = load_embedder("squeezenet1_1", weights=str(weights), device="cpu")
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    assert named.predictor.features(images).shape == (2, 512)
    assert named.digest != embedder.digest
    assert named.digest == load_embedder("squeezenet1_1", weights=str(weights), device="cpu").digest
    with pytest.raises(UserError, match="there is no model 'resnet17'"):
        load_embedder("resnet17")
    with pytest.raises(UserError, match="no regraft header"):
        load_embedder(str(weights))
