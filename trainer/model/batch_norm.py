"""BatchNorm under fine-tuning: frozen statistics, batches of one example, several processes.

What is changed is changed on the single layer, by module-level functions: it survives `train()`, `deepcopy`,
wrapping by DDP and pickling.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.errors import UserError


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the model's BatchNorm layers that keep running statistics."""
    return [layer for _, layer in named_batch_norms(model)]


def named_batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return (name, layer) of the model's BatchNorm layers that keep running statistics."""
    return [
        (name, m)
        for name, m in model.named_modules()
        if isinstance(m, _BatchNorm) and m.running_mean is not None
    ]


def freeze_batch_norm(model: nn.Module) -> int:
    """Keep BatchNorm's running statistics as they are, and in use, whatever `train()` says.

    Returns how many layers it found. Weights and biases of these layers go on training: they get their
    gradients as before.
    """
    layers = batch_norms(model)
    for layer in layers:
        layer.eval()
        layer.train = partial(_stay_in_eval, layer)  # type: ignore[method-assign]
    return len(layers)


def copy_frozen_flags(copied: nn.Module, model: nn.Module) -> None:
    """Let the statistics of a copy be kept as they are where the model's are now, and nowhere else."""
    for layer, other in zip(batch_norms(copied), batch_norms(model), strict=True):
        if not is_frozen(other):
            vars(layer).pop("train", None)
        elif not is_frozen(layer):
            freeze_batch_norm(layer)


def _stay_in_eval(layer: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return layer


def unfreeze_batch_norm(model: nn.Module, *, training: bool) -> None:
    """Let BatchNorm follow `train()` again, beginning in the given mode."""
    for layer in batch_norms(model):
        if is_frozen(layer):
            del layer.train
        layer.train(training)


def is_frozen(layer: _BatchNorm) -> bool:
    """Return whether a layer keeps its statistics, whatever `train()` says."""
    return "train" in vars(layer)


@contextmanager
def batch_norm_in_eval(model: nn.Module) -> Iterator[None]:
    """Let every BatchNorm layer use its running statistics, unchanged, for a block; then restore modes."""
    modes = [(layer, layer.training) for layer in batch_norms(model)]
    try:
        for layer, _ in modes:
            layer.training = False
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def allow_single_value_batches(model: nn.Module) -> int:
    """Let a batch with one value per channel train on, where torch raises; return how many layers it guards.

    A ragged last batch of one example, or a process's share of one, meets BatchNorm over 1 x 1 maps with a
    single value per channel: it has no variance. For that forward the layer uses its running statistics, and
    leaves them. SyncBatchNorm is not touched: it sees the other processes' values.
    """
    layers = [m for m in batch_norms(model) if not isinstance(m, nn.SyncBatchNorm)]
    for layer in layers:
        layer.forward = partial(_forward, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward(layer: _BatchNorm, images: Tensor) -> Tensor:
    if layer.training and images.numel() == images.shape[1]:
        return functional.batch_norm(
            images,
            layer.running_mean,
            layer.running_var,
            layer.weight,
            layer.bias,
            training=False,
            eps=layer.eps,
        )
    return type(layer).forward(layer, images)


def gather_batch_norm_statistics(model: nn.Module, world_size: int) -> dict[str, Tensor]:
    """Return each process's statistics of the layers that are not frozen: `RANK.name` -> float64, on the CPU.

    Every process calls it, with the same model. Empty for one process, which has its statistics in its model.
    """
    mine = _live_statistics(model)
    if world_size == 1 or not mine:
        return {}
    flat = torch.cat([s.detach().double().flatten() for s in mine.values()])
    every = [torch.empty_like(flat) for _ in range(world_size)]
    torch.distributed.all_gather(every, flat)
    sizes = [s.numel() for s in mine.values()]
    return {
        f"{rank}.{name}": part.reshape(mine[name].shape)
        for rank, all_of_rank in enumerate(every)
        for name, part in zip(mine, all_of_rank.cpu().split(sizes), strict=True)
    }


@torch.no_grad()
def restore_batch_norm_statistics(
    model: nn.Module, gathered: dict[str, Tensor], *, rank: int, world_size: int
) -> None:
    """Put back what `gather_batch_norm_statistics` returned; among another number of processes, its average over them.

    Raises:
        UserError: it is of another model.

    """
    live = _live_statistics(model)
    saved = len(gathered) // max(1, len(live))
    wanted = {
        f"{number}.{name}": (tensor.shape, torch.float64)
        for name, tensor in live.items()
        for number in range(saved)
    }
    if {name: (tensor.shape, tensor.dtype) for name, tensor in gathered.items()} != wanted:
        raise UserError(
            "the checkpoint's BatchNorm statistics are those of another model: expected "
            f"{len(live)} tensors for each process. Start anew with --run.resume never, which moves the run aside"
        )
    if saved == 0:
        return  # one process has written it: its statistics stand in the model
    for name, statistic in live.items():
        parts = [gathered[f"{number}.{name}"] for number in range(saved)]
        value = parts[rank] if saved == world_size else torch.stack(parts).mean(0)
        statistic.copy_(value)


def _live_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_frozen(layer)
        for key, buffer in layer.named_buffers(recurse=False)
    }


def average_batch_norm_statistics(model: nn.Module, world_size: int) -> None:
    """Replace running means and variances by their averages over the `world_size` processes, in one all-reduce.

    Every process calls it, with the same model. Frozen layers and num_batches_tracked are left.
    """
    layers = [layer for layer in batch_norms(model) if not is_frozen(layer)]
    if world_size == 1 or not layers:
        return
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    flat = torch.cat([s.detach().float() for s in statistics])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    parts = torch.split(flat, [s.numel() for s in statistics])
    with torch.no_grad():
        for statistic, average in zip(statistics, parts, strict=True):
            statistic.copy_(average)
