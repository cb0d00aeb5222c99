"""Choose precision and memory layout of a run: as asked, as the run began, as measured before, or by measuring now."""

import json
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console
from torch import Tensor

from trainer.config.build_loaders import make_dataset, make_train_transform
from trainer.config.build_model import make_model
from trainer.config.resolve import ResolvedConfig
from trainer.data.augment import Normalize
from trainer.data.index import Example
from trainer.data.loader import Collate
from trainer.data.sampler import SampleKey
from trainer.distributed.context import DistributedContext
from trainer.distributed.precision import PRECISIONS, Execution, Precision, asked_precision, supported_precisions
from trainer.errors import UserError
from trainer.optim.autotune import autotune
from trainer.optim.core_wait import MAX_FRACTION, CoreWait
from trainer.run.atomic import write_text_atomically
from trainer.run.folder import saved_execution
from trainer.text import escape_unprintable

_Key = TypeVar("_Key")

FILE = "autotune.json"
"""File of the cache folder that holds earlier measurements. Remove it to measure again."""
MIN_IMAGES = 256
"""Shorter runs are not measured: measuring takes as long as training on 50 to 200 images."""
MIN_IMAGES_FOR_LAYOUTS = 1024
"""Shorter runs take channels_last without a measurement of the other memory layout, which is seldom faster."""
_EVALUATION_COST = 1 / 3  # of an image whose gradient is not computed
_EXAMPLES, _FEW_EXAMPLES = 8, 4  # of each of the two batches that are compared; on a CPU of few cores
_FEW_THREADS = 8
_GPU_BATCH = 64  # images of a timed update on a GPU: with few images it would wait for its kernels to start
_MAX_ENTRIES = 500


@dataclass(frozen=True, kw_only=True)
class Workload:
    """What is trained, on which the fastest execution depends."""

    config: ResolvedConfig
    """Of one phase of the run."""
    examples: Sequence[Example]
    """The training examples."""
    classes: Sequence[str]
    """Names of the classes."""
    weights: str | None
    """Name or file of the pretrained weights; None for random ones."""
    evaluated: int = 0
    """Number of images that are evaluated after each epoch."""

    @property
    def cost(self) -> float:
        """Return the cost of the run in training images, of which those with cached features are computed once."""
        data, train = self.config.data, self.config.train
        is_frozen = self.config.transfer.trainable == "head"
        evaluated = self.evaluated * (1.0 if is_frozen else _EVALUATION_COST)
        if not is_frozen or train.cache_features == "off":
            return (len(self.examples) + evaluated) * train.epochs
        views = data.views if data.has_random_transform else 1
        return len(self.examples) * min(train.epochs, views or train.epochs) + evaluated


def choose_execution(
    workload: Workload, ctx: DistributedContext, console: Console, *, saved: Execution | None = None
) -> tuple[ResolvedConfig, DistributedContext]:
    """Return the config and the context with `train.precision auto` and `train.channels_last auto` resolved.

    Every process must call it. A resumed run keeps what it began with, or its results would differ. Otherwise what was
    measured before is read from the cache folder, or a few updates are measured now.

    Args:
        workload: model and data.
        ctx: the processes.
        console: prints the choice and its reason.
        saved: what the run began with, on rank 0; None for a new run.

    Raises:
        UserError: see `make_model`; or this device does not support what the run began with.

    """
    train, saved = workload.config.train, ctx.broadcast(saved)
    asked = asked_precision(train.precision, os.environ)
    precisions = supported_precisions(ctx.device) if asked is None else (asked,)
    layouts = (True, False) if train.channels_last == "auto" else (train.channels_last,)
    default = Execution(precisions[0], layouts[0])
    asked_by = "train.precision" if train.precision != "auto" else "accelerate launch --mixed_precision"
    if saved is not None and saved.precision not in supported_precisions(ctx.device):
        raise UserError(
            f"this run began in precision {saved.precision}, which {ctx.device} does not have: resume on a machine "
            "that has it, or start anew by --run.resume never, which archives the run"
        )
    if len(precisions) * len(layouts) == 1 and saved in (None, default):
        chosen, reason = default, f"as {asked_by} asks"
    elif saved is not None:  # its values of options that are not auto were compared with this run's
        chosen, reason = saved, "as at the start of this run"
    else:
        file, min_images = Path(workload.config.data.cache) / FILE, MIN_IMAGES
        keys = [_key(workload, ctx, precisions, layouts)]
        if workload.cost < MIN_IMAGES_FOR_LAYOUTS:
            layouts = layouts[:1]
            keys.append(_key(workload, ctx, precisions, layouts))
            min_images = MIN_IMAGES if len(precisions) > 1 else MIN_IMAGES_FOR_LAYOUTS
        entries = _read(file) if ctx.is_main_process else {}
        entry = ctx.broadcast(next((entries[key] for key in keys if key in entries), None))
        if entry is not None:
            chosen, reason = entry
        elif len(workload.examples) < 2 * _batch_size(ctx) or workload.cost < min_images:
            chosen, reason = default, f"runs of less than {min_images:,} images are not measured"
        else:
            chosen, reason, is_disturbed = _measure(workload, ctx, console, precisions, layouts)
            if is_disturbed:
                reason += "; not cached, because other processes used the cores"
            elif ctx.is_main_process and (problem := _write(file, keys[-1], chosen, reason)):
                console.print(problem)
        if asked is not None:
            reason = f"as {asked_by} asks; {reason}"
    console.print(f"precision {chosen}: {reason}")
    resolved = replace(train, precision=chosen.precision, channels_last=chosen.channels_last)
    return replace(workload.config, train=resolved), ctx.with_precision(chosen.precision)


def with_one_execution(
    runs: Mapping[_Key, ResolvedConfig], workload: Workload, ctx: DistributedContext, console: Console
) -> tuple[dict[_Key, ResolvedConfig], Execution]:
    """Return the configs of runs that are compared, with one precision and memory layout in place of `auto`, and these.

    Every process must call it. They are chosen for the workload, or taken from the first run that has begun.

    Raises:
        UserError: see `choose_execution`.

    """
    began = (saved_execution(Path(config.run.dir)) for config in runs.values()) if ctx.is_main_process else iter(())
    chosen, ctx = choose_execution(workload, ctx, console, saved=next(filter(None, began), None))
    execution = Execution(ctx.precision, chosen.train.uses_channels_last)

    def resolved(config: ResolvedConfig) -> ResolvedConfig:
        train = config.train
        precision = execution.precision if train.precision == "auto" else train.precision
        channels_last = execution.channels_last if train.channels_last == "auto" else train.channels_last
        return replace(config, train=replace(train, precision=precision, channels_last=channels_last))

    return {key: resolved(config) for key, config in runs.items()}, execution


def _measure(
    workload: Workload,
    ctx: DistributedContext,
    console: Console,
    precisions: Sequence[Precision],
    layouts: Sequence[bool],
) -> tuple[Execution, str, bool]:
    """Return the best execution of a throw-away model, the figures, and whether other processes disturbed them.

    All processes measure at the same time.
    """
    config = workload.config
    built = ctx.main_process_first(
        lambda: make_model(
            config, workload.classes, workload.weights, world_size=ctx.world_size, on_progress=console.print
        ),
        local=True,
    )
    built.model.to(ctx.device)
    on_gpu = ctx.device.type == "cuda"
    local_batch = -(-config.train.batch_size // (ctx.world_size * config.train.grad_accum_steps))
    if isinstance(config.train.micro_batch_size, int):
        local_batch = min(local_batch, config.train.micro_batch_size)
    wait = CoreWait()
    best, *others = autotune(
        built.model,
        _load_batches(workload, ctx),
        batch_size=min(local_batch, _GPU_BATCH if on_gpu else _batch_size(ctx)),
        precisions=precisions,
        layouts=layouts,
        max_across_ranks=ctx.max_across_ranks,
    )
    is_disturbed = not on_gpu and ctx.max_across_ranks(wait.fraction()) > MAX_FRACTION
    del built
    if on_gpu:
        torch.cuda.empty_cache()
    figures = ", ".join(str(measurement) for measurement in (best, *others))
    return best.execution, f"measured, images/s of forward and backward: {figures}", is_disturbed


def _batch_size(ctx: DistributedContext) -> int:
    """Return the number of images that are compared: fewer, where they take long."""
    return _FEW_EXAMPLES if ctx.device.type == "cpu" and ctx.threads <= _FEW_THREADS else _EXAMPLES


def _load_batches(workload: Workload, ctx: DistributedContext) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return two batches of training images, spread over the examples, as the model's input and labels."""
    config, count = workload.config, 2 * _batch_size(ctx)
    chosen = [len(workload.examples) * number // count for number in range(count)]
    dataset = make_dataset(workload.examples, make_train_transform(config.data), config, ctx)
    items = dataset.__getitems__([SampleKey(0, example) for example in chosen])
    images, labels, _ = Collate(config.data.image_size, channels_last=True)(items)
    inputs, labels = Normalize(config.data.preprocessing, ctx.device)(images.to(ctx.device)), labels.to(ctx.device)
    return (inputs[0::2], labels[0::2]), (inputs[1::2], labels[1::2])


def _key(workload: Workload, ctx: DistributedContext, precisions: Sequence[Precision], layouts: Sequence[bool]) -> str:
    """Return what a measurement depends on. The phases of a run share it: weights do not change the speed."""
    config = workload.config
    on_gpu = ctx.device.type == "cuda"
    parts = {
        "device": torch.cuda.get_device_name(ctx.device) if on_gpu else _cpu_name(),
        "threads": ctx.threads,
        "processes": ctx.local_world_size,
        "torch": torch.__version__,
        "model": config.model.name,
        "image_size": config.data.image_size,
        "batch_size": config.train.batch_size // (ctx.world_size * config.train.grad_accum_steps) if on_gpu else None,
        "trainable": config.transfer.trainable,
        "batch_norm": config.transfer.batch_norm,
        "candidates": [*precisions, *layouts],
    }
    return json.dumps(parts)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # not Linux
        lines = []
    details = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    # A virtual machine may hide the model. Its instruction sets tell whether bf16 is computed in hardware.
    flags = sorted({"amx_bf16", "avx512_bf16", "avx512f", "avx2", "bf16"} & set(details.get("flags", "").split()))
    return " ".join([details.get("model name", platform.machine()), torch.backends.cpu.get_cpu_capability(), *flags])


def _read(file: Path) -> dict[str, tuple[Execution, str]]:
    """Return the measurements of a cache file; none if it is missing or damaged, which measures again."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return {key: _parse(entry) for key, entry in content.items()}
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return {}


def _parse(entry: Any) -> tuple[Execution, str]:
    precision, channels_last, reason = entry
    if not (precision in PRECISIONS and isinstance(channels_last, bool) and isinstance(reason, str)):
        raise TypeError(f"not a measurement: {entry!r}")
    return Execution(precision, channels_last), reason


def _write(file: Path, key: str, chosen: Execution, reason: str) -> str | None:
    """Add a measurement to a cache file; return a line to print if that is not possible."""
    entries = {**_read(file), key: (chosen, f"{reason} (cached)")}
    content = {name: (*execution, text) for name, (execution, text) in list(entries.items())[-_MAX_ENTRIES:]}
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(content, indent=1) + "\n")
    except OSError as error:
        path = escape_unprintable(str(file))
        return f"{path}: cannot be written to ({error.strerror}), so the next run measures its precision again"
    return None
