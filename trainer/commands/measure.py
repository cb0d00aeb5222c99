"""How fast a config reads its images, decodes them, trains and writes: for probe.py, on one process."""

import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from trainer.config.build_loaders import make_train_transform, num_loader_workers
from trainer.config.build_model import make_l2_sp, make_model, make_optimizer, make_param_groups
from trainer.config.build_training import make_train_step
from trainer.config.resolve import ResolvedConfig, without_weights
from trainer.data.dataset import ImageDataset
from trainer.data.loader import Batch
from trainer.data.prepare import prepare
from trainer.data.registry import is_known
from trainer.data.sampler import SampleKey
from trainer.distributed.context import init_distributed
from trainer.optim.param_groups import set_lr
from trainer.report.console import peak_memory

SECONDS = 1.0
"""That each figure is measured for, at least one piece of work."""
MOST_WRITTEN = 256 << 20
_CHUNK = 16 << 20
_SAMPLED = 256
_DRAWN = 48
_DRAWN_SIZE = (500, 375)
_MOST_ON_CPU = 8
"""Examples of a measured step on a CPU: its rate hardly depends on them, its duration does."""


@dataclass(frozen=True)
class Sample:
    """Some images, as training reads them."""

    paths: tuple[str, ...]
    classes: int
    images: ImageDataset
    what: str
    """For a reader."""


def sample(config: ResolvedConfig, folder: Path) -> Sample:
    """Return images of a resolved config's data; where that is known by name, such as are drawn into `folder`.

    Raises:
        UserError: the data cannot be found or listed.

    """
    if is_known(config.data.root):
        examples, classes = draw(folder), 10
        what = f"drawn JPEG files of {_DRAWN_SIZE[0]} x {_DRAWN_SIZE[1]}, in place of {config.data.root}"
    else:
        index = prepare(config.data, workers=1, check=False).index
        every = max(1, len(index.train) // _SAMPLED)
        examples = [(one.path, one.label) for one in index.train[::every][:_SAMPLED]]
        classes = len(index.classes)
        what = f"{len(examples)} of {len(index.train)} in {config.data.root}"
    transform = make_train_transform(config.data)
    paths = tuple(path for path, _ in examples)
    return Sample(paths, classes, ImageDataset(examples, transform, seed=0), what)


def draw(folder: Path) -> list[tuple[str, int]]:
    """Write JPEG files about as large and as hard to decode as photographs; returns (path, 0) pairs."""
    random = np.random.default_rng(0)
    examples = []
    for number in range(_DRAWN):
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize(_DRAWN_SIZE, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-6, 7, smooth.shape, dtype=np.int16)
        path = folder / f"{number:03}.jpg"
        with path.open("wb") as file:
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(file, format="JPEG", quality=85)
            file.flush()
            os.fsync(file.fileno())
        examples.append((str(path), 0))
    return examples


def reading(paths: Sequence[str], *, threads: int = 8) -> dict[str, Any]:
    """Return how many images a second several readers get from the disk, past the kernel's cache where it lets go."""

    def read(path: str) -> int:
        with open(path, "rb", buffering=0) as file:  # noqa: PTH123
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            return len(file.read())

    began = time.perf_counter()
    count = size = 0
    with ThreadPoolExecutor(threads) as pool:
        for start in range(0, len(paths), threads):
            sizes = list(pool.map(read, paths[start : start + threads]))
            count, size = count + len(sizes), size + sum(sizes)
            if time.perf_counter() - began > SECONDS:
                break
    seconds = time.perf_counter() - began
    return {"images_per_second": count / seconds, "bytes_per_second": size / seconds, "threads": threads}


def decoding(images: ImageDataset) -> dict[str, Any]:
    """Return how many images a second one core decodes and augments."""
    count = len(images)
    torch.set_num_threads(1)
    began = time.perf_counter()
    done = 0
    while not done or time.perf_counter() - began < SECONDS:
        images[SampleKey(done // count, done % count)]
        done += 1
    return {"images_per_second": done / (time.perf_counter() - began)}


class Model:
    """The config's model with random weights, ready for a step."""

    def __init__(self, config: ResolvedConfig, *, processes: int, classes: int) -> None:
        ctx = init_distributed(
            device=config.run.device, precision=config.train.precision, threads=config.run.threads
        )
        self._config, self._machine = config, ctx
        self._device = ctx.device
        share = -(-config.train.batch_size // processes)
        self._examples = share if self._device.type == "cuda" else min(share, _MOST_ON_CPU)
        self._classes = classes
        # Weights would have to be fetched, and no figure depends on them.
        created = make_model(
            without_weights(config),
            [str(number) for number in range(classes)],
            None,
            on_progress=lambda _: None,
        )
        created.model.to(self._device)
        optimizer = make_optimizer(make_param_groups(created, config), config)
        set_lr(optimizer, 0.0)
        state = sum(one.numel() * one.element_size() for one in created.model.state_dict().values())
        trained = sum(one.numel() * one.element_size() for one in created.model.parameters())
        moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
        self.gradient_bytes = trained
        averages = int(config.regularization.ema is not None)
        self.model_bytes = state
        self.checkpoint_bytes = (1 + averages) * state + moments * trained
        l2_sp = make_l2_sp(created, without_weights(config))
        self._train_step = make_train_step(config, [1] * classes, ctx, l2_sp).plain()
        self._model, self._optimizer = ctx.prepare(created.model, optimizer)

    def sizes(self) -> dict[str, Any]:
        """Return what the model asks of network, disk and processors."""

        checkpoints = self._config.checkpoint.keep_last + 1 + int(self._config.checkpoint.keep_best)
        # The line of WiSE-FT keeps its start and its other end beside the model file.
        models = 3 if self._config.transfer.wise_ft else 1
        workers = num_loader_workers(self._config.data.num_workers, self._machine)
        return {
            "gradient_bytes": self.gradient_bytes,
            "checkpoint_bytes": self.checkpoint_bytes,
            "kept_bytes": checkpoints * self.checkpoint_bytes + models * self.model_bytes,
            "workers": workers,
            "cores": self._machine.cores,
            "decoding_cores": min(workers or self._machine.threads, self._machine.cores),
            "device": self._device.type,
        }

    def step(self) -> dict[str, Any]:
        """Return the pace of training steps on one process, without reading images, and the memory they take."""

        torch.set_num_threads(self._machine.threads)
        size, count = self._config.data.image_size, self._examples
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8)
        layout = torch.channels_last if self._config.train.channels_last else torch.contiguous_format
        batch = Batch(
            images.to(self._device).contiguous(memory_format=layout),
            torch.randint(0, self._classes, (count,), device=self._device),
            torch.arange(count, device=self._device),
        )
        self._model.train()

        def one() -> float:
            began = time.perf_counter()
            self._train_step(self._model, self._optimizer, batch, 0, count)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return time.perf_counter() - began

        one()  # the first also chooses its kernels
        times: list[float] = []
        while sum(times) < SECONDS:
            times.append(one())
        on_gpu = self._device.type == "cuda"
        return {
            "images_per_second": count * len(times) / sum(times),
            "examples": count,
            "precision": self._machine.precision,
            "device": str(self._device),
            "threads": self._machine.threads,
            "peak_bytes": peak_memory(self._device),
            "memory_bytes": torch.cuda.get_device_properties(self._device).total_memory if on_gpu else None,
        }


def writing(folder: Path, size: int) -> dict[str, Any]:
    """Return how fast a file of `size` bytes, or its beginning, comes to the disk of a folder."""
    size = min(size, MOST_WRITTEN)
    chunk = os.urandom(min(_CHUNK, size))
    path = folder / "written"
    began = time.perf_counter()
    done = 0
    try:
        with path.open("wb", buffering=0) as file:
            while done < size and (not done or time.perf_counter() - began < SECONDS):
                done += file.write(chunk[: size - done])
                os.fsync(file.fileno())
    finally:
        path.unlink(missing_ok=True)
    return {"bytes_per_second": done / (time.perf_counter() - began), "bytes": done}
