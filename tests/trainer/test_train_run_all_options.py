"""A run of a model with BatchNorm and dropout, with every option that has a state: exact results, kills and resumes."""

import csv
import json
import re
import shutil
import signal
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from torchvision import models

import regraft
from regraft.contract import CHECKPOINTS, EVALUATION, IMAGES, METRICS, MODEL, PREDICTIONS
from tests.folders import noise_image
from tests.trainer.phases import (
    EPOCHS,
    assert_equal_runs,
    audit_rows,
    contents,
    copy_run,
    rewind,
    rows,
    small_config,
    train,
    with_options,
)
from trainer.checkpoint import store
from trainer.checkpoint.state import CheckpointId
from trainer.config.build_data import load_run_data
from trainer.config.build_loaders import make_train_transform
from trainer.config.build_model import make_model
from trainer.config.build_training import make_train_step
from trainer.config.resolve import ResolvedConfig
from trainer.config.schema import Config
from trainer.data.augment import Normalize
from trainer.data.decode import decode
from trainer.data.sampler import SampleKey
from trainer.distributed.context import DistributedContext
from trainer.distributed.precision import Execution
from trainer.distributed.signals import Stopped
from trainer.errors import UserError
from trainer.model.metadata import read_metadata
from trainer.optim.mixup import sample_params
from trainer.report.summary import best_row
from trainer.run.folder import FINE_TUNED, INITIAL, WISE
from trainer.seeds import derive_seed
from trainer.transfer.l2_sp import L2SP

ALPHAS = {"mixup": 0.5, "cutmix": 1.0}
SMOOTHING = 0.1


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> ResolvedConfig:
    """Return the config of a finished run."""
    folder = tmp_path_factory.mktemp("run")
    torch.manual_seed(11)
    save_file(models.mobilenet_v3_small().state_dict(), folder / "source.safetensors")
    config = with_options(
        small_config(folder),
        model={"name": "mobilenet_v3_small", "weights": str(folder / "source.safetensors")},
        transfer={"l2_sp": 0.5, "wise_ft": True, "batch_norm": "train"},
        regularization={"ema": 0.9, "early_stopping": 9, "label_smoothing": SMOOTHING, **ALPHAS},
    )
    train(config)
    return config


@pytest.fixture
def copy(finished: ResolvedConfig, tmp_path: Path) -> ResolvedConfig:
    """Return the config of a copy of the finished run, which a test may change."""
    return copy_run(finished, tmp_path / "run")


def test_the_first_loss_is_that_of_balanced_augmented_erased_and_mixed_images(
    finished: ResolvedConfig, ctx: DistributedContext
) -> None:
    index = load_run_data(finished, ctx, Console(quiet=True)).index
    drawn = [example for row in audit_rows(finished)[:2] for example in row["examples"]]
    classes = Counter(index.train[example].label for example in drawn)
    assert sorted(classes.values()) == [3, 4], "balanced: of 5 and 2 images"

    model = make_model(finished, "ab", finished.model.weights, on_progress=print).model.train()
    transform, images, repeats = make_train_transform(finished.data), [], Counter[int]()
    for example in drawn[:4]:
        generator = SampleKey(0, example, repeats[example]).generator(0)
        repeats[example] += 1
        images.append(transform(np.asarray(decode(index.train[example].path)), generator))
    batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
    labels = torch.tensor([index.train[example].label for example in drawn[:4]])
    params = sample_params(mixup_alpha=ALPHAS["mixup"], cutmix_alpha=ALPHAS["cutmix"], seed=0, step=0, size=4)
    others, other_labels = batch[list(params.permutation)], labels[list(params.permutation)]
    assert params.box is None, "mixup; step 0 has no CutMix"
    mixed, lam = (1 - params.lam) * batch + params.lam * others, params.lam
    torch.manual_seed(derive_seed("masks", 0, 0, 0))
    logits = model(Normalize(finished.data.preprocessing, torch.device("cpu"))(mixed))
    own, other = (cross_entropy(logits, target, label_smoothing=SMOOTHING).item() for target in (labels, other_labels))
    assert rows(finished, "train")[0]["train_loss"] == pytest.approx((1 - lam) * own + lam * other, rel=1e-4)
    assert [row["train_seen"] for row in rows(finished) if row["kind"] != "classes"] == [4, 7, 7] * EPOCHS


def test_balanced_class_weights_count_the_training_images(finished: ResolvedConfig, ctx: DistributedContext) -> None:
    config = with_options(finished, data={"sampling": "shuffled"}, regularization={"class_weights": "balanced"})
    counts = load_run_data(config, ctx, Console(quiet=True)).examples_per_class
    weights = make_train_step(config, counts, ctx, L2SP([], 0.0, decoupled=False)).criterion.class_weights
    assert weights is not None
    assert weights.tolist() == pytest.approx([7 / (2 * 5), 7 / (2 * 2)])


def best_average(config: Config) -> dict[str, torch.Tensor]:
    """Return the moving average in the checkpoint of the best epoch."""
    best = best_row(rows(config, "epoch"), "val")
    checkpoint = CheckpointId(best["step"], best["epoch"])
    return load_file(Path(config.run.dir) / CHECKPOINTS / checkpoint.name / store.EMA)


def test_the_model_file_interpolates_the_initial_weights_and_the_best_epochs_average(finished: ResolvedConfig) -> None:
    folder, ema = Path(finished.run.dir), best_average(finished)
    initial, source = load_file(folder / INITIAL), load_file(str(finished.model.weights))
    assert initial["classifier.3.weight"].shape[0] == 2
    kept = [name for name in initial if not name.startswith("classifier.3.")]
    assert all(torch.equal(initial[name], source[name]) for name in kept)

    best, wise = best_row(rows(finished, "epoch"), "val"), json.loads((folder / WISE).read_text())
    assert wise["val_accuracy_of_fine_tuned"] == best["val_accuracy"]
    assert wise["val_loss_of_fine_tuned"] == pytest.approx(best["val_loss"], rel=1e-6)
    for name, tensor in load_file(folder / MODEL).items():
        if tensor.is_floating_point():
            expected = (1 - wise["alpha"]) * initial[name].double() + wise["alpha"] * ema[name].double()
            torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=1e-6)


def test_the_weights_are_averaged_after_every_update(finished: ResolvedConfig) -> None:
    folder = Path(finished.run.dir)
    average = {name: tensor.double() for name, tensor in load_file(folder / INITIAL).items()}
    checkpoints = reversed(store.list_checkpoints(folder / CHECKPOINTS))
    for step, checkpoint in enumerate(checkpoints, start=1):
        trained, ema = (load_file(folder / CHECKPOINTS / checkpoint.name / name) for name in (store.MODEL, store.EMA))
        decay = min(0.9, (1 + step) / (10 + step))
        for name in (name for name in average if name.endswith("weight")):
            average[name] = decay * average[name] + (1 - decay) * trained[name].double()
            torch.testing.assert_close(ema[name].double(), average[name], rtol=1e-4, atol=1e-6)
            assert not torch.equal(trained[name], ema[name])


def test_the_model_file_is_evaluated_at_the_end(
    finished: ResolvedConfig, copy: ResolvedConfig, ctx: DistributedContext
) -> None:
    folder = Path(copy.run.dir)
    saved, metadata = json.loads((folder / EVALUATION).read_text()), read_metadata(folder / MODEL)
    wise = json.loads((folder / WISE).read_text())
    assert metadata is not None
    assert (saved["model"], saved["epoch"]) == (MODEL, metadata.metrics["epoch"])
    for split in ("val", "test"):
        assert saved["splits"][split]["accuracy"] == wise[f"{split}_accuracy"]
        assert saved["splits"][split]["log_loss"] == pytest.approx(wise[f"{split}_loss"], rel=1e-6)
    assert metadata.temperature == saved["temperature"]
    assert metadata.execution == Execution("fp32", channels_last=True)

    model, index = regraft.load(folder / MODEL), load_run_data(finished, ctx, Console(quiet=True)).index
    with (folder / PREDICTIONS).open() as file:
        table = list(csv.DictReader(file))
    examples = [*index.val, *index.test]
    assert [row["path"] for row in table] == [example.path for example in examples]
    assert [row["split"] for row in table] == ["val"] * 5 + ["test"] * 2
    for row, example, prediction in zip(table, examples, model.predict([row["path"] for row in table]), strict=True):
        assert (row["label"], row["prediction"]) == ("ab"[example.label], prediction.label)
        assert float(row["probability"]) == pytest.approx(prediction.score, rel=1e-4)

    before = contents(copy)
    (folder / EVALUATION).unlink()
    with pytest.raises(Stopped) as stopped:
        train(copy, before=lambda run: setattr(run.signals, "received", signal.SIGTERM))
    assert stopped.value.saved == "the end of training, before the final evaluation"
    assert not (folder / EVALUATION).exists()
    train(copy)
    assert contents(copy) == before
    for name in (EVALUATION, PREDICTIONS):  # a kill before they were written
        (folder / name).unlink()
        assert "finished already" in train(copy)[1]
        assert contents(copy) == before


def test_a_killed_run_resumes_bit_identically(copy: ResolvedConfig, finished: ResolvedConfig) -> None:
    rewind(copy, 5, 2)
    (Path(copy.run.dir) / METRICS).write_text("{")  # cut off by the kill
    result, printed = train(copy)
    assert "resuming after epoch 2 of 3 (step 5)" in printed
    assert [row["epoch"] for row in result.rows] == [1, 2, 3]
    assert_equal_runs(copy, finished)
    *before, last = audit_rows(copy)
    assert [row | {"attempt": 1} for row in (*before[:5], last)] == audit_rows(finished)
    assert (last["step"], last["attempt"]) == (5, 2)


def test_a_resumed_run_names_an_image_whose_content_has_changed(copy: ResolvedConfig, tmp_path: Path) -> None:
    root = Path(shutil.copytree(copy.data.root, tmp_path / "images"))
    config = with_options(copy, data={"root": str(root)})
    image, record = root / "train" / "a" / "000.png", Path(copy.run.dir) / IMAGES
    content, recorded = image.read_bytes(), record.read_text()
    noise_image(99).save(image)
    assert "finished already" in train(config)[1], "no image is read any more"
    rewind(config, 5, 2)
    message = "1 of 14 images have another content than when this run began: .*/train/a/000.png"
    with pytest.raises(UserError, match=rf"{message}\. Restore them; or .* --data\.on_changed continue; or"):
        train(config)
    record.write_text('{"blake2b": "12"}')
    with pytest.raises(UserError, match=r"images cannot be read \(expected 14 hashes\)"):
        train(config)
    record.write_text(recorded)
    image.write_bytes(content)  # with another modification time
    assert "another content" not in train(config)[1]
    assert record.read_text() == recorded
    rewind(config, 5, 2)
    noise_image(99).save(image)
    assert re.search(message, train(with_options(config, data={"on_changed": "continue"}))[1])
    assert record.read_text() != recorded


def test_a_finished_run_is_only_reported_and_can_be_extended(copy: ResolvedConfig) -> None:
    before, folder = contents(copy), Path(copy.run.dir)
    result, printed = train(copy)
    assert f"finished already, after epoch {EPOCHS}" in printed
    assert "alpha" not in printed
    assert [row["epoch"] for row in result.rows] == [1, 2, 3]
    assert contents(copy) == before

    (folder / WISE).unlink()  # a kill after the last update, before WiSE-FT was done
    (folder / METRICS).unlink()
    _, printed = train(copy)
    assert "alpha" in printed
    assert contents(copy) == before

    result, printed = train(with_options(copy, train={"epochs": EPOCHS + 1}))
    assert "for 8 steps instead of 6: from here on, the learning rate is that of the longer run" in printed
    assert "alpha" in printed, "WiSE-FT is done again, from the best epoch's own weights"
    assert [row["epoch"] for row in result.rows] == [1, 2, 3, 4]
    tuned = load_file(folder / (FINE_TUNED if (folder / FINE_TUNED).exists() else MODEL))
    assert all(torch.equal(tensor, best_average(copy)[name]) for name, tensor in tuned.items())
    with pytest.raises(UserError, match=r"train\.epochs: 4 there, 3 now"):
        train(copy)
