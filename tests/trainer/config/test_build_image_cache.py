import io
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from tests.disks import disk
from tests.folders import image_folder, noise_image
from trainer.config import build_image_cache
from trainer.config.build_data import load_run_data
from trainer.config.build_loaders import make_batches, make_eval_loader
from trainer.config.parse import parse
from trainer.config.resolve import ResolvedConfig, resolve
from trainer.config.run_data import RunData
from trainer.data import dataset, deferred_checks
from trainer.data.dataset import Batch, ImageReadError
from trainer.data.decode import decode
from trainer.data.image_cache import build
from trainer.data.image_cache.store import MISSING
from trainer.distributed.context import DistributedContext
from trainer.errors import UserError

TRAIN, EVALUATED = 12, 8
SIZE = 16


class Decoded:
    """Records the paths that are decoded by the loaders, and by the pass that builds the cache."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.by_loaders: list[str] = []
        self.by_build: list[str] = []
        original = build.decode_file

        def decode_in_loader(path: str) -> Any:
            self.by_loaders.append(path)
            return decode(path)

        def decode_in_build(file: Any, path: str) -> Any:
            self.by_build.append(path)
            return original(file, path)

        monkeypatch.setattr(dataset, "decode", decode_in_loader)
        monkeypatch.setattr(build, "decode_file", decode_in_build)


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Decoded:
    return Decoded(monkeypatch)


@pytest.fixture(autouse=True)
def _empty_memory() -> Iterator[None]:
    yield
    build_image_cache._memory.keep_only(set())


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return image_folder(tmp_path / "data", {"train": {"a": 6, "b": 6}, "val": {"a": 4, "b": 4}})


def config(root: Path, mode: str, *options: str) -> ResolvedConfig:
    fixed = [f"--data.root={root}", f"--data.cache={root.parent / 'cache'}", f"--data.cache_images={mode}"]
    sizes = [f"--data.image_size={SIZE}", "--train.batch_size=5", "--model.weights=null", "--data.num_workers=0"]
    return resolve(parse([*fixed, *sizes, *options]))


def load(config: ResolvedConfig, ctx: DistributedContext) -> tuple[RunData, str]:
    """Return the data, and the line about the image cache."""
    output = io.StringIO()
    data = load_run_data(config, ctx, Console(file=output, width=1000))
    return data, "\n".join(line for line in output.getvalue().splitlines() if line.startswith("image cache"))


def batches(config: ResolvedConfig, data: RunData, ctx: DistributedContext) -> list[Batch]:
    """Return the batches of two epochs, of the evaluation, and of the evaluation of the training images."""
    train = make_batches(config, data.index, data.order, ctx, epochs=2, images=data.images)
    evaluated = [make_eval_loader(split, config, ctx, data.images) for split in (data.index.test, data.index.train)]
    return [*train, *(batch for loader in evaluated for batch in loader)]


def assert_equal(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert a.images.stride() == b.images.stride()


@pytest.mark.parametrize(("augment", "tolerance"), [("basic", 2), ("none", 0)])
def test_images_on_the_device_give_the_same_batches_within_2_gray_levels(
    root: Path, ctx: DistributedContext, decoded: Decoded, augment: str, tolerance: int
) -> None:
    device, off = (config(root, mode, f"--data.augment={augment}") for mode in ("device", "off"))
    data, line = load(device, ctx)
    assert line.startswith(f"image cache: {TRAIN + EVALUATED} of {TRAIN + EVALUATED} images, ")
    decoded.by_loaders.clear()
    on_device = batches(device, data, ctx)
    assert not decoded.by_loaders, "they come from the cache"
    for one, other in zip(on_device, batches(off, data, ctx), strict=True):
        assert torch.equal(one.labels, other.labels)
        assert torch.equal(one.examples, other.examples)
        assert one.images.stride() == other.images.stride()
        assert (one.images.int() - other.images.int()).abs().max() <= tolerance


@pytest.mark.parametrize("augment", ["basic", "none"])
def test_batches_are_bit_identical_with_and_without_the_cache(
    root: Path, ctx: DistributedContext, decoded: Decoded, augment: str
) -> None:
    options = [f"--data.augment={augment}"]
    off = config(root, "off", *options)
    data, line = load(off, ctx)
    assert line == ""
    assert not (root.parent / "cache" / "images").exists()
    expected = batches(off, data, ctx)
    for mode in ("disk", "ram", "auto"):
        data, line = load(config(root, mode, *options), ctx)
        assert line.startswith(f"image cache: {TRAIN + EVALUATED} of {TRAIN + EVALUATED} images, ")
        decoded.by_loaders.clear()
        for workers in (0, 2):
            cached = config(root, mode, *options, f"--data.num_workers={workers}")
            assert_equal(batches(cached, data, ctx), expected)
        if augment == "none":  # only outputs of the evaluation transform are cached
            assert (data.images.originals == MISSING).all()
        assert decoded.by_loaders == []


def test_the_first_start_decodes_each_image_once(root: Path, ctx: DistributedContext, decoded: Decoded) -> None:
    noise_image(99).save(root / "train" / "a" / "copy 1.png")
    noise_image(99).save(root / "train" / "b" / "copy 2.png")
    images = TRAIN + EVALUATED + 2
    _, line = load(config(root, "auto"), ctx)
    assert decoded.by_build == [], "stored by the validation"
    folder = root.parent / "cache" / "images"
    assert re.fullmatch(rf"image cache: {images} of {images} images, .* kB, in {folder}; \d+ were added in .* s", line)
    _, line = load(config(root, "auto"), ctx)
    assert re.fullmatch(rf"image cache: {images} of {images} images, .* kB, in {folder}", line)
    assert decoded.by_build == []
    load(config(root, "auto", "--data.augment=none"), ctx)
    assert decoded.by_build == [], "from the cached originals"
    for path in folder.iterdir():
        path.unlink()
    load(config(root, "auto"), ctx)
    assert len(decoded.by_build) == images - 1, "validated by an earlier start"


def test_another_size_or_content_is_another_entry(root: Path, ctx: DistributedContext, decoded: Decoded) -> None:
    options = ["--data.augment=none"]
    load(config(root, "auto", *options), ctx)
    for other in ("--data.resize=shorter", "--data.interpolation=bicubic", f"--data.resize_size={SIZE + 3}"):
        changed = config(root, "auto", *options, other)
        data, _ = load(changed, ctx)
        off = config(root, "off", *options, other)
        assert_equal(batches(changed, data, ctx), batches(off, load(off, ctx)[0], ctx))
    noise_image(77).save(root / "train" / "a" / "000.png")
    changed, off = config(root, "auto", *options), config(root, "off", *options)
    assert_equal(batches(changed, load(changed, ctx)[0], ctx), batches(off, load(off, ctx)[0], ctx))


def test_cache_resize_changes_the_training_images_alone_with_or_without_a_cache(
    root: Path, ctx: DistributedContext, decoded: Decoded
) -> None:
    plain = config(root, "off")
    before = batches(plain, load(plain, ctx)[0], ctx)
    off = config(root, "off", "--data.cache_resize=20")
    expected = batches(off, load(off, ctx)[0], ctx)
    steps = 2 * 3
    assert not any(torch.equal(a.images, b.images) for a, b in zip(before[:steps], expected[:steps], strict=True))
    assert_equal(before[steps:], expected[steps:])
    for mode in ("auto", "ram"):
        resized = config(root, mode, "--data.cache_resize=20")
        data, line = load(resized, ctx)
        assert f"{(TRAIN * 20 * 27 * 3 + EVALUATED * 3 * SIZE**2) / 1e3:.1f} kB" in line
        assert_equal(batches(resized, data, ctx), expected)
    larger = config(root, "auto", "--data.cache_resize=31")
    assert_equal(batches(larger, load(larger, ctx)[0], ctx), before)


@pytest.mark.parametrize("mode", ["auto", "ram"])
def test_what_does_not_fit_into_memory_is_decoded_in_every_epoch(
    root: Path, ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch, decoded: Decoded, mode: str
) -> None:
    off = config(root, "off")
    expected = batches(off, load(off, ctx)[0], ctx)
    image = 40 * 30 * 3
    memory = 2 * (EVALUATED * 3 * SIZE**2 + 5 * image)
    monkeypatch.setattr(build_image_cache, "available_memory", lambda: memory - build_image_cache._memory.size)
    limited = config(root, mode)
    for start in range(2):
        decoded.by_loaders.clear()
        data, line = load(limited, ctx)
        assert line.startswith(f"image cache: {EVALUATED + 5} of {TRAIN + EVALUATED} images, "), start
        assert "The others are decoded in every epoch: they do not fit into half of the available memory" in line
        assert_equal(batches(limited, data, ctx), expected)
        assert len(decoded.by_loaders) == 3 * (TRAIN - 5)
    if mode == "ram":
        assert not (root.parent / "cache" / "images").exists()


def test_a_folder_that_cannot_be_written_to(root: Path, ctx: DistributedContext) -> None:
    """`auto` decodes from the files, and reads what an earlier start has cached; `disk` is an error."""
    off = config(root, "off")
    expected = batches(off, load(off, ctx)[0], ctx)
    with disk(root.parent / "cache" / "images", "640m") as folder:
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        auto = config(root, "auto")
        data, line = load(auto, ctx)
        assert line == (
            f"image cache: 0 of {TRAIN + EVALUATED} images, 0 bytes, in {folder}. The others are decoded in every "
            f"epoch: {folder} cannot be written to (Read-only file system)"
        )
        assert_equal(batches(auto, data, ctx), expected)
        with pytest.raises(UserError, match=r"^data\.cache_images is disk, but .*Read-only.*set data\.cache_images to"):
            load(config(root, "disk"), ctx)
        subprocess.run(["mount", "-o", "remount,rw", folder], check=True)
        load(auto, ctx)
        subprocess.run(["mount", "-o", "remount,ro", folder], check=True)
        for mode in ("auto", "disk"):
            data, line = load(config(root, mode), ctx)
            assert line.startswith(f"image cache: {TRAIN + EVALUATED} of {TRAIN + EVALUATED} images")
            assert_equal(batches(auto, data, ctx), expected)


def test_ram_is_kept_for_the_next_phase_and_freed_for_other_images(
    root: Path, ctx: DistributedContext, tmp_path: Path
) -> None:
    memory = build_image_cache._memory
    ram = config(root, "ram")
    load(ram, ctx)
    (first,) = memory.paths
    _, line = load(ram, ctx)
    assert memory.paths == [first]
    assert line.endswith("in memory")
    other = image_folder(tmp_path / "other" / "data", {"train": {"a": 3, "b": 3}, "val": {"a": 2, "b": 2}}, seed=1)
    load(config(other, "ram"), ctx)
    assert len(memory.paths) == 1


@pytest.mark.parametrize("mode", ["auto", "device", "off"])
def test_an_image_that_was_overwritten_is_noticed_when_it_is_read(
    root: Path, ctx: DistributedContext, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    """In a large data set, most files are compared with their validation results when they are read."""

    def fail(*_: object) -> None:
        raise UserError("the processes disagree")

    monkeypatch.setattr(deferred_checks, "MAX_COMPARED", 2)
    options = config(root, mode)
    load(options, ctx)
    noise_image(99).save(root / "val" / "b" / "003.png")
    data, _ = load(options, ctx)
    with pytest.raises(
        ImageReadError, match=r"^.*/val/b/003\.png: .* another content .* the same command again, .*continue$"
    ):
        batches(options, data, ctx)
    data, _ = load(options, ctx)
    changed = batches(options, data, ctx)
    with monkeypatch.context() as patched:  # as if another machine, with a cache of its own, had noticed a change
        patched.setattr(DistributedContext, "check_equal_across_ranks", fail)
        with pytest.raises(UserError) as error:
            load(options, ctx)
    assert error.value.__notes__ == [
        "This start has not compared all of them, the next one does: start the same command again"
    ]
    data, _ = load(options, ctx)
    assert data.images.deferred is None
    data, _ = load(options, ctx)
    assert data.images.deferred is not None
    assert_equal(batches(options, data, ctx), changed)
    monkeypatch.setattr(deferred_checks, "MAX_COMPARED", 100)
    data, _ = load(config(root, "off"), ctx)
    assert data.images.deferred is None
    if mode == "off":
        assert_equal(batches(options, data, ctx), changed)
