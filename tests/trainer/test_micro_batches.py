"""The micro-batches of a run: found, kept, and halved after an attempt ran out of memory."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision import models

from regraft.contract import read_attempts
from tests.folders import image_folder
from tests.trainer.phases import assert_equal_runs, in_folder, rewind, train, with_options
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.schema import Config
from trainer.errors import OutOfMemory, UserError
from trainer.optim import micro_batch


@pytest.fixture
def config(tmp_path: Path) -> ResolvedConfig:
    """Return the config of a run of 2 updates on 8 images each, with stages."""
    return resolve(
        with_options(
            Config(),
            run={"dir": str(tmp_path / "run"), "device": "cpu"},
            data={
                "root": str(image_folder(tmp_path / "images", {"train": {"a": 5, "b": 3}, "test": {"a": 1, "b": 1}})),
                "image_size": 32, "num_workers": 0, "cache": str(tmp_path / "cache"),
            },
            model={"name": "squeezenet1_1", "weights": None},
            transfer={"trainable": {0: "head", 1: "all"}},
            optim={"name": "adamw"},
            train={"epochs": 2, "batch_size": 8, "precision": "fp32"},
            checkpoint={"keep_last": 9},
        )
    )  # fmt: skip


def saved_size(config: Config) -> int:
    return int(json.loads((Path(config.run.dir) / "micro-batch.json").read_text())["size"])


@pytest.fixture
def full_memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Return a function that lets the forward of more than `images` images run out of memory, from a call on."""
    forward = nn.Conv2d.forward

    def limit(images: int, start: int = 0) -> None:
        calls = 0

        def limited(layer: nn.Conv2d, inputs: Tensor) -> Tensor:
            nonlocal calls
            calls += torch.is_grad_enabled()
            if torch.is_grad_enabled() and len(inputs) > images and calls > start:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB. See x.")
            return forward(layer, inputs)

        monkeypatch.setattr(nn.Conv2d, "forward", limited)

    return limit


def test_auto_is_found_in_the_last_stage_and_kept(
    config: ResolvedConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    budgets: list[int] = []

    def extrapolate(measure: Callable[[int], int], local: int, budget: int, *, least: int) -> int:
        budgets.append(budget)
        assert 0 < measure(1) < budget
        assert local == 8
        return 3

    monkeypatch.setattr(micro_batch, "extrapolate_largest", extrapolate)
    monkeypatch.setattr(micro_batch, "available_memory", lambda: 10**10)
    auto, three = (
        with_options(in_folder(config, tmp_path / str(size)), train={"micro_batch_size": size}) for size in ("auto", 3)
    )
    assert "micro-batch size 3, estimated from the memory of 8: 3 micro-batches per update" in train(auto)[1]
    assert saved_size(auto) == 3
    train(three)
    assert_equal_runs(auto, three)
    rewind(auto, 1, 1)
    assert "micro-batch size 3, as in an earlier attempt" in train(auto)[1]
    assert_equal_runs(auto, three)
    parameters = sum(p.numel() for p in models.squeezenet1_1(num_classes=2).parameters())
    batches = 2 * 8 * 3 * 32 * 32
    assert budgets == [8 * 10**9 - 2 * 4 * parameters - batches], "the moments of all parameters, and two batches"


def test_out_of_memory_halves_the_micro_batches_of_the_next_attempts(
    config: ResolvedConfig, tmp_path: Path, full_memory: Callable[..., None]
) -> None:
    full_memory(3)
    for size, half in ((8, 4), (4, 2)):
        with pytest.raises(OutOfMemory, match=rf"of {size} images \(CUDA out of memory. Tried to allocate 2.00 GiB\):"):
            train(config)
        assert saved_size(config) == half
    assert [a.state for a in read_attempts(Path(config.run.dir))] == ["failed", "failed"]
    assert "micro-batch size 2, as in an earlier attempt" in train(config)[1]
    two = with_options(in_folder(config, tmp_path / "two"), train={"micro_batch_size": 2})
    train(two)
    assert_equal_runs(config, two)


def test_out_of_memory_in_mid_run_resumes_from_the_newest_checkpoint(
    config: ResolvedConfig, full_memory: Callable[..., None]
) -> None:
    full_memory(7, 26)  # the first epoch is one forward of 26 convolutions
    with pytest.raises(OutOfMemory, match="resumes from the newest checkpoint with micro-batches of 4, which"):
        train(config)
    assert read_attempts(Path(config.run.dir))[0].epoch == 1
    assert len(train(config)[0].rows) == 2


def test_single_images_and_whole_batches_cannot_be_halved(
    config: ResolvedConfig, full_memory: Callable[..., None]
) -> None:
    full_memory(0)
    single = with_options(config, train={"micro_batch_size": 1})
    with pytest.raises(UserError, match=r"micro-batches of 1 image .* cannot be smaller: use train\.gradient_check"):
        train(single)
    whole = with_options(in_folder(config, Path(f"{config.run.dir}-whole")), transfer={"batch_norm": "sync"})
    with pytest.raises(UserError, match=r"transfer\.batch_norm sync does not split the batch"):
        train(whole)


def test_a_saved_size_is_for_the_same_options(config: ResolvedConfig, full_memory: Callable[..., None]) -> None:
    full_memory(7)
    with pytest.raises(OutOfMemory):
        train(config)
    full_memory(8)
    printed = train(with_options(config, train={"gradient_checkpointing": True}))[1]
    assert "micro-batch size" not in printed
    assert "gradient checkpointing of 8 blocks, features.3 to features.12" in printed
    (Path(config.run.dir) / "micro-batch.json").write_text("{")
    with pytest.raises(UserError, match=r"micro-batch\.json: damaged .* Delete it"):
        train(with_options(config, train={"epochs": 3}))
