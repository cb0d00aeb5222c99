"""Largest micro-batch: how many images of a process fit in memory in one forward and backward.

Micro-batches of doubling size run through the real model, forward and backward. On a GPU, the first one that raises
`torch.OutOfMemoryError` is too large. On a CPU, the kernel would kill the process instead. There, the peak memory of up
to 8 images is measured and extrapolated, since it grows linearly with the number of images.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from torch import nn

from regraft.memory import available_memory
from trainer.errors import UserError
from trainer.optim.train_step import TrainStep

_CUDA_MARGIN, _CPU_MARGIN = 0.05, 0.2
"""Share of the memory that is left free: of the whole GPU, or of what is available in RAM."""
_MEASURED_IMAGES = 8
_MIN_ACTIVATIONS = 10
"""Least memory of an image, as a multiple of the model's input in float32: peaks of small models are noise."""
_STATUS, _RESET_PEAK = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that the memory of the GPU or of the machine is full."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and should_reduce_batch_size(error)


def largest_micro_batch(
    train_step: TrainStep, model: nn.Module, optimizer: torch.optim.Optimizer, *, image_size: int, local: int
) -> tuple[int, str]:
    """Return the largest micro-batch that fits in the memory of every process, and how it was found.

    Every process must call it. Weights, gradients, statistics, moments and random numbers stay unchanged.

    Args:
        train_step: makes the updates.
        model: unwrapped, so that no process waits for one that has run out of memory. All parameters require gradients
            that will.
        optimizer: prepared by accelerate. Moments that it does not have yet are counted.
        image_size: of the model's input [pixels].
        local: largest local batch.

    Raises:
        UserError: not even one image fits, or the memory cannot be measured.

    """
    ctx, error, size = train_step.ctx, None, 0
    whole = replace(train_step, grad_accum_steps=1, micro_batch_size=None)
    reserved = _missing_moments(model, optimizer)
    reserved += 2 * local * 3 * image_size**2 * (4 if train_step.mixup.enabled else 1)  # this batch and the next one

    def run(size: int) -> None:
        images = torch.zeros(size, 3, image_size, image_size, dtype=torch.uint8, device=ctx.device)
        labels = torch.zeros(size, dtype=torch.int64, device=ctx.device)
        try:
            whole.backward(model, (images.contiguous(memory_format=torch.channels_last), labels, labels), 1.0)
        finally:
            optimizer.zero_grad()

    try:
        with _unchanged(model, ctx.device):
            if ctx.device.type == "cuda":
                size, how = _largest_on_gpu(run, local, reserved, ctx.device), "tried on the GPU"
            else:
                budget = int((1 - _CPU_MARGIN) * available_memory() / ctx.local_world_size) - reserved
                least = 4 * 3 * image_size**2 * _MIN_ACTIVATIONS
                base = _read_status("VmRSS")
                size = extrapolate_largest(lambda size: _peak_memory(run, size) - base, local, budget, least=least)
                how = f"estimated from the memory of {min(local, _MEASURED_IMAGES)}"
    except UserError as caught:
        error = caught
    ctx.raise_on_all_ranks(error)
    return -ctx.all_reduce_max([-size])[0], how


def _missing_moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Return the size of the moments [bytes] that the optimizer creates in its first update."""
    defaults = optimizer.defaults
    moments = 2 if "betas" in defaults else int(bool(defaults.get("momentum")))
    new = [p for p in model.parameters() if p.requires_grad and not optimizer.state.get(p)]
    return moments * sum(p.numel() * p.element_size() for p in new)


@contextmanager
def _unchanged(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Put the model in train mode; restore its mode, its buffers and the random generators at the end."""
    buffers, was_training = [buffer.clone() for buffer in model.buffers()], model.training
    try:
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            model.train()
            yield
    finally:
        model.train(was_training)
        with torch.no_grad():
            for buffer, before in zip(model.buffers(), buffers, strict=True):
                buffer.copy_(before)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)


def _largest_on_gpu(run: Callable[[int], None], local: int, reserved: int, device: torch.device) -> int:
    total = torch.cuda.get_device_properties(device).total_memory
    largest = 0
    try:
        reserve = torch.empty(reserved + int(_CUDA_MARGIN * total), dtype=torch.uint8, device=device)
        largest = try_largest(run, local)
        del reserve
    except torch.OutOfMemoryError:  # of the reserve
        pass
    clear_device_cache(garbage_collection=True)
    if not largest:
        raise UserError(
            f"train.micro_batch_size auto: not even one image fits in the {total / 2**30:.1f} GiB of GPU memory. Use "
            "train.gradient_checkpointing true, train.precision bf16, a smaller data.image_size or another model"
        )
    return largest


def try_largest(run: Callable[[int], None], local: int) -> int:
    """Return the largest of the sizes 1, 2, 4, ..., `local` that runs before one is out of memory; 0 if none does."""
    largest, size = 0, 1
    while size <= local:
        try:
            run(size)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            break
        largest, size = size, local if size < local < 2 * size else 2 * size
    return largest


def extrapolate_largest(measure: Callable[[int], int], local: int, budget: int, *, least: int) -> int:
    """Return the largest micro-batch whose peak memory is expected within a budget; at least 1.

    Args:
        measure: number of images -> peak memory [bytes] of a forward and backward.
        local: largest local batch.
        budget: available memory [bytes].
        least: memory that an image needs at least [bytes].

    """
    size, peak = 1, measure(1)
    per_image, largest = 0.0, local if peak <= budget else 1
    while peak <= budget and size < min(local, _MEASURED_IMAGES):
        next_size = min(2 * size, local, _MEASURED_IMAGES)
        if size + (budget - peak) / max(per_image, 1) < next_size:
            break
        next_peak = measure(next_size)
        # The first pass allocates the gradients too, which the next ones do not: only differences count.
        per_image = max(least, (next_peak - peak) / (next_size - size))
        size, peak = next_size, next_peak
        largest = size + math.floor((budget - peak) / per_image)
    return max(1, min(local, largest))


def _peak_memory(run: Callable[[int], None], size: int) -> int:
    """Return the peak of the resident memory [bytes] of this process while a micro-batch runs."""
    try:
        _RESET_PEAK.write_text("5", encoding="ascii")  # see proc(5)
    except OSError as error:
        raise UserError(
            f"train.micro_batch_size is auto, but the peak memory of a process cannot be measured here ({error}): set "
            "train.micro_batch_size to a number, such as 16"
        ) from None
    run(size)
    return _read_status("VmHWM")


def _read_status(key: str) -> int:
    lines = _STATUS.read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))
