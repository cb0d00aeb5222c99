"""Measure how fast one process decodes the images of a config and trains its model, for probe.py."""

import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from trainer.config.build_loaders import make_train_transform, num_loader_workers
from trainer.config.build_model import make_l2_sp, make_model, make_optimizer, make_param_groups
from trainer.config.build_training import make_train_step
from trainer.config.execution import Workload, choose_execution
from trainer.config.parse import parse
from trainer.config.resolve import resolve, without_weights
from trainer.data.dataset import Batch, ImageDataset
from trainer.data.index import Example
from trainer.data.prepare import prepare
from trainer.data.registry import is_known
from trainer.data.sampler import SampleKey
from trainer.distributed.context import init_distributed
from trainer.optim.param_groups import set_lr
from trainer.report.console import peak_memory

SECONDS = 1.0
"""Duration of each measurement, of at least one image or step."""
_MAX_IMAGES, _SYNTHETIC_IMAGES = 256, 48
_MAX_CPU_BATCH = 8
"""Batch size of a measured step on a CPU: the rate hardly depends on it, but the duration does."""
_AUTO_BATCH = 128
"""Batch size of a measured step on a GPU with train.micro_batch_size auto."""


class MeasuredRun:
    """A run with some of its images, and with its model once `build_model` is called.

    Raises:
        UserError: an option is wrong, or the data cannot be found or listed.

    """

    def __init__(self, options: Sequence[str], folder: Path, *, processes: int) -> None:
        self._config = config = resolve(parse(options))
        self._processes = processes
        if is_known(config.data.root):  # it may have to be downloaded
            self._examples: Sequence[Example] = write_images(folder)
            self._classes: Sequence[str] = [str(number) for number in range(10)]
            images = f"synthetic JPEG files of 500 x 375 instead of {config.data.root}"
        else:
            index = prepare(config.data, workers=1, check=False).index
            self._examples, self._classes = index.train.spread(_MAX_IMAGES), index.classes
            images = f"{len(self._examples)} of {len(index.train)} images in {config.data.root}"
        self._images = ImageDataset(self._examples, make_train_transform(config.data), seed=0)
        self.description = {"model": config.model.name, "images": images}

    def decoding(self) -> dict[str, Any]:
        """Return how many images per second one core decodes and augments."""
        torch.set_num_threads(1)
        count, start = 0, time.perf_counter()
        while not count or time.perf_counter() - start < SECONDS:
            self._images[SampleKey(count // len(self._images), count % len(self._images))]
            count += 1
        return {"images_per_second": count / (time.perf_counter() - start)}

    def build_model(self) -> dict[str, Any]:
        """Build the model; return the size of gradients and checkpoints [bytes], and the cores that decode images."""
        config = self._config
        ctx = init_distributed(device=config.run.device, precision=config.train.precision, threads=config.run.threads)
        workload = Workload(
            config=without_weights(config), examples=self._examples, classes=self._classes, weights=None
        )
        chosen, ctx = choose_execution(workload, ctx, Console(quiet=True))
        config = self._config = replace(config, train=chosen.train)
        self._ctx, self._device = ctx, ctx.device
        # The pretrained weights would have to be downloaded, and the speed does not depend on them.
        created = make_model(chosen, self._classes, None, on_progress=lambda _: None)
        created.model.to(self._device)
        optimizer = make_optimizer(make_param_groups(created, config), config)
        set_lr(optimizer, 0.0)
        model_bytes = _bytes(created.model.state_dict().values())
        gradient_bytes = _bytes(created.model.parameters())
        l2_sp = make_l2_sp(created, chosen)
        self._train_step = make_train_step(config, [1] * len(self._classes), ctx, l2_sp).plain()
        self._model, self._optimizer = ctx.prepare(created.model, optimizer)
        moments = 2 if config.optim.name == "adamw" else int(config.optim.momentum > 0)
        averages = int(config.regularization.ema is not None)
        checkpoint_bytes = (1 + averages) * model_bytes + moments * gradient_bytes
        checkpoints = config.checkpoint.keep_last + 1 + int(config.checkpoint.keep_best)
        models = 3 if config.transfer.wise_ft else 1  # WiSE-FT also saves the weights that it interpolates
        workers = num_loader_workers(config.data.num_workers, ctx)
        return {
            "gradient_bytes": gradient_bytes,
            "checkpoints_bytes": checkpoints * checkpoint_bytes + models * model_bytes,
            "workers": workers,
            "cores": ctx.cores,
            "decoding_cores": min(workers or ctx.threads, ctx.cores),
        }

    def step(self) -> dict[str, Any]:
        """Return the speed of training steps without data loading, and the memory that they need."""
        config, device = self._config, self._device
        on_gpu, size = device.type == "cuda", config.data.image_size
        local_batch = -(-config.train.batch_size // self._processes)
        limit = config.train.micro_batch_size if on_gpu else _MAX_CPU_BATCH
        count = min(local_batch, _AUTO_BATCH if limit == "auto" else limit or local_batch)
        images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8).to(device)
        layout = torch.channels_last if config.train.uses_channels_last else torch.contiguous_format
        batch = Batch(
            images.contiguous(memory_format=layout),
            torch.randint(0, len(self._classes), (count,), device=device),
            torch.arange(count, device=device),
        )
        torch.set_num_threads(self._ctx.threads)
        self._model.train()

        def time_step() -> float:
            start = time.perf_counter()
            self._train_step(self._model, self._optimizer, batch, 0, count)
            if on_gpu:
                torch.cuda.synchronize(device)
            return time.perf_counter() - start

        time_step()  # the first step is slower, since it chooses its kernels
        times: list[float] = []
        while sum(times) < SECONDS:
            times.append(time_step())
        return {
            "images_per_second": count * len(times) / sum(times),
            "batch_size": count,
            "precision": self._ctx.precision,
            "device": str(device),
            "peak_bytes": peak_memory(device),
            "memory_bytes": torch.cuda.get_device_properties(device).total_memory if on_gpu else None,
        }


def write_images(folder: Path) -> list[Example]:
    """Write JPEG files that are as large and as slow to decode as photographs; return them with label 0."""
    random = np.random.default_rng(0)
    paths = [str(folder / f"{number}.jpg") for number in range(_SYNTHETIC_IMAGES)]
    for path in paths:
        coarse = Image.fromarray(random.integers(0, 256, (24, 32, 3), dtype=np.uint8))
        smooth = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = smooth + random.integers(-6, 7, smooth.shape, dtype=np.int16)
        Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(path, quality=85)
    return [Example(path, 0) for path in paths]


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
