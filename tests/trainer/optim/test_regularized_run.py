"""A whole run with every option that goes together: each reaches the training, and a run that goes on ends the same."""

import json
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.folders import image_folder
from tests.trainer.test_train_run import PLACES, back_to, equal, in_folder, rows, train
from trainer.config.builders import load_dataset, make_criterion, make_epoch_order, make_preprocessing
from trainer.config.model_builder import make_model
from trainer.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    ModelConfig,
    RegularizationConfig,
    RunConfig,
    TrainConfig,
)
from trainer.data.augment import Normalize, apply_seeded, train_transform
from trainer.data.decode import decode
from trainer.distributed import context
from trainer.optim.mixup import apply_cutmix, sample_params
from trainer.pipeline import resolve
from trainer.report.console import make_console
from trainer.seeds import derive_seed

ALPHAS = {"mixup": 0.5, "cutmix": 1.0}
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Config]:
    """Return the config of a run that has ended: 5 pictures of one class and 2 of the other, 2 steps an epoch."""
    home = tmp_path_factory.mktemp("regularised")
    threads = torch.get_num_threads()
    root = image_folder(home / "images", {"train": {"a": 5, "b": 2}, "test": {"a": 1, "b": 1}})
    config = resolve(
        Config(
            run=RunConfig(dir=str(home / "run"), device="cpu", audit=True),
            data=DataConfig(
                root=str(root),
                image_size=32,
                num_workers=0,
                cache=str(home / "cache"),
                random_erasing=1.0,
                sampling="balanced",
            ),
            model=ModelConfig(name="squeezenet1_1", weights=None),
            regularization=RegularizationConfig(label_smoothing=SMOOTHING, **ALPHAS),
            train=TrainConfig(epochs=3, batch_size=4, precision="fp32", logs_per_epoch=2),
            checkpoint=CheckpointConfig(every="1 steps", keep_last=100),
        )
    )
    train(config)
    yield config
    torch.set_num_threads(threads)


def test_the_first_loss_is_of_balanced_erased_and_mixed_pictures_under_smoothed_labels(
    config: Config,
) -> None:
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    index = load_dataset(config.data, ctx, make_console(speaks=False)).index
    audit = (Path(config.run.dir) / "audit" / "rank-0.jsonl").read_text().splitlines()
    drawn = [example for line in audit[:2] for example in json.loads(line)["examples"]]
    classes = Counter(index.train[example].label for example in drawn)
    assert sorted(classes.values()) == [3, 4], "of 5 and 2 pictures"

    torch.manual_seed(derive_seed("weights", 0))  # run.seed is 0, as is the first step
    model = make_model(config, "ab", None, on_progress=print).model.train()
    preprocessing = make_preprocessing(config.data)
    transform = train_transform(
        preprocessing, "recipe", config.data.crop_scale, random_erasing=config.data.random_erasing
    )
    seen: Counter[int] = Counter()
    pictures = []
    for example in drawn[:4]:
        place = (0, example, seen[example]) if seen[example] else (0, example)
        seen[example] += 1
        picture = decode(index.train[example].path)
        pictures.append(np.asarray(apply_seeded(transform, picture, derive_seed("crop", 0, *place))))
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    labels = torch.tensor([index.train[example].label for example in drawn[:4]])
    mixture = sample_params(**ALPHAS, seed=0, step=0, size=4)
    others, theirs = images[list(mixture.permutation)], labels[list(mixture.permutation)]
    if mixture.box is None:
        mixed, weight = (1 - mixture.lam) * images + mixture.lam * others, mixture.lam
    else:
        mixed, weight = apply_cutmix(images, others, mixture.box)
    torch.manual_seed(derive_seed("masks", 0, 0, 0))
    logits = model(Normalize(preprocessing, torch.device("cpu"))(mixed))
    own, mixed_in = (
        cross_entropy(logits, wanted, label_smoothing=SMOOTHING).item() for wanted in (labels, theirs)
    )
    first = next(row for row in rows(config) if row["kind"] == "train")
    assert first["train_loss"] == pytest.approx((1 - weight) * own + weight * mixed_in, rel=1e-4)
    assert first["train_seen"] == 4
    assert [row["train_seen"] for row in rows(config) if row["kind"] == "epoch"] == [7] * 3


@pytest.mark.parametrize("place", PLACES[::2], ids=lambda place: f"step {place[0]}")
def test_a_run_that_was_killed_goes_on_and_ends_the_same(
    place: tuple[int, int], config: Config, tmp_path: Path
) -> None:
    shutil.copytree(config.run.dir, tmp_path / "run")
    copy = in_folder(config, tmp_path / "run")
    back_to(copy, *place)
    train(copy)
    assert equal(copy, config)
    seen = [
        json.loads(line) for line in (tmp_path / "run" / "audit" / "rank-0.jsonl").read_text().splitlines()
    ]
    again = {row["step"]: row for row in seen if row["attempt"] == 2}
    assert list(again) == list(range(place[0], 6))
    for row in seen:
        if row["attempt"] == 1 and row["step"] in again:
            assert (row["examples"], row["pixels"]) == tuple(
                again[row["step"]][key] for key in ("examples", "pixels")
            )


def test_class_weights_are_of_the_pictures_that_are_trained_on(config: Config) -> None:
    ctx = context.start(device="cpu", precision="fp32", threads=1)
    weighing = replace(
        config,
        data=replace(config.data, sampling="shuffled"),
        regularization=RegularizationConfig(class_weights="balanced", label_smoothing=SMOOTHING),
    )
    index = load_dataset(weighing.data, ctx, make_console(speaks=False)).index
    index = replace(index, train=index.train[1:])  # one of the first class's five went to be selected on
    criterion = make_criterion(weighing, index, torch.device("cpu"))
    assert criterion.class_weights is not None
    assert criterion.class_weights.tolist() == pytest.approx([6 / (2 * 4), 6 / (2 * 2)])
    assert criterion.label_smoothing == SMOOTHING
    assert make_criterion(config, index, torch.device("cpu")).class_weights is None
    assert make_epoch_order(weighing, index).labels is None
    assert make_epoch_order(config, index).labels == (0, 0, 0, 0, 1, 1)
