"""BatchNorm in fine-tuning: frozen running statistics, batches of one example, and several processes.

The functions replace `train` or `forward` of single layers by module-level functions, so that the change survives
`train()`, `deepcopy`, pickling and DDP's wrapper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from trainer.errors import UserError


def batch_norms(model: nn.Module) -> list[_BatchNorm]:
    """Return the model's BatchNorm layers with running statistics."""
    return [layer for _, layer in named_batch_norms(model)]


def named_batch_norms(model: nn.Module) -> list[tuple[str, _BatchNorm]]:
    """Return (name, layer) of the model's BatchNorm layers with running statistics."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm) and module.running_mean is not None
    ]


def freeze_batch_norm(model: nn.Module) -> int:
    """Freeze BatchNorm's running statistics: `train()` no longer changes or disables them. Return the number of layers.

    Weights and biases of these layers still get their gradients.
    """
    layers = batch_norms(model)
    for layer in layers:
        layer.eval()
        layer.train = partial(_stay_in_eval, layer)  # type: ignore[method-assign]
    return len(layers)


def copy_frozen_flags(copied: nn.Module, model: nn.Module) -> None:
    """Freeze the running statistics of a copy where the model's are frozen, and unfreeze them elsewhere."""
    for layer, other in zip(batch_norms(copied), batch_norms(model), strict=True):
        if not is_frozen(other):
            vars(layer).pop("train", None)
        elif not is_frozen(layer):
            freeze_batch_norm(layer)


def _stay_in_eval(layer: _BatchNorm, mode: bool = True) -> _BatchNorm:
    return layer


def unfreeze_batch_norm(model: nn.Module, *, training: bool) -> None:
    """Let BatchNorm follow `train()` again, starting in the given mode."""
    for layer in batch_norms(model):
        if is_frozen(layer):
            del layer.train
        layer.train(training)


def is_frozen(layer: _BatchNorm) -> bool:
    """Return whether a layer's running statistics are frozen."""
    return "train" in vars(layer)


@contextmanager
def batch_norm_in_eval(model: nn.Module) -> Iterator[None]:
    """Use the running statistics of every BatchNorm layer within a block, unchanged; restore the modes at its end."""
    modes = [(layer, layer.training) for layer in batch_norms(model)]
    try:
        for layer, _ in modes:
            layer.training = False
        yield
    finally:
        for layer, mode in modes:
            layer.training = mode


def allow_single_value_batches(model: nn.Module) -> int:
    """Let BatchNorm train on a single value per channel, where torch raises. Return the number of layers changed.

    A local batch of one example gives BatchNorm over 1 x 1 maps a single value per channel, which has no variance. For
    such a forward the layer uses its running statistics and does not update them. SyncBatchNorm is not changed: it
    sees the values of the other processes.
    """
    layers = [layer for layer in batch_norms(model) if not isinstance(layer, nn.SyncBatchNorm)]
    for layer in layers:
        layer.forward = partial(_forward_or_eval, layer)  # type: ignore[method-assign]
    return len(layers)


def _forward_or_eval(layer: _BatchNorm, images: Tensor) -> Tensor:
    forward = type(layer).forward
    if not (layer.training and images.numel() == images.shape[1]):
        return forward(layer, images)
    # Of this layer alone: timm's layers contain an activation, which keeps its mode.
    layer.training = False
    try:
        return forward(layer, images)
    finally:
        layer.training = True


def convert_sync_batch_norm(model: nn.Module) -> nn.Module:
    """Return the model with SyncBatchNorm for BatchNorm. timm's layers keep their activations."""
    if any(type(layer).__module__.startswith("timm.") for layer in batch_norms(model)):
        from timm.layers import convert_sync_batchnorm  # noqa: PLC0415 (an optional package)

        return cast(nn.Module, convert_sync_batchnorm(model))
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return converted


def gather_batch_norm_statistics(model: nn.Module, world_size: int) -> dict[str, Tensor]:
    """Return the statistics of every process and unfrozen layer: `RANK.NAME` -> float64, on the CPU.

    Every process must call it, with the same model. Empty for one process, whose model holds its statistics.
    """
    local = _unfrozen_statistics(model)
    if world_size == 1 or not local:
        return {}
    flat = torch.cat([statistic.detach().double().flatten() for statistic in local.values()])
    gathered = [torch.empty_like(flat) for _ in range(world_size)]
    torch.distributed.all_gather(gathered, flat)
    sizes = [statistic.numel() for statistic in local.values()]
    return {
        f"{rank}.{name}": statistic.reshape(local[name].shape)
        for rank, of_rank in enumerate(gathered)
        for name, statistic in zip(local, of_rank.cpu().split(sizes), strict=True)
    }


@torch.no_grad()
def restore_batch_norm_statistics(model: nn.Module, gathered: dict[str, Tensor], *, rank: int, world_size: int) -> None:
    """Restore what `gather_batch_norm_statistics` returned. Another number of processes gets the mean over all of them.

    Raises:
        UserError: the statistics belong to another model.

    """
    local = _unfrozen_statistics(model)
    saved_world_size = len(gathered) // max(1, len(local))
    expected = {
        f"{saved_rank}.{name}": (tensor.shape, torch.float64)
        for name, tensor in local.items()
        for saved_rank in range(saved_world_size)
    }
    if {name: (tensor.shape, tensor.dtype) for name, tensor in gathered.items()} != expected:
        raise UserError(
            "the checkpoint's BatchNorm statistics are those of another model: expected "
            f"{len(local)} tensors for each process. Start anew with --run.resume never, which archives the run"
        )
    if saved_world_size == 0:
        return  # the checkpoint was written by one process: the model already holds its statistics
    for name, statistic in local.items():
        of_ranks = [gathered[f"{saved_rank}.{name}"] for saved_rank in range(saved_world_size)]
        value = of_ranks[rank] if saved_world_size == world_size else torch.stack(of_ranks).mean(0)
        statistic.copy_(value)


def _unfrozen_statistics(model: nn.Module) -> dict[str, Tensor]:
    return {
        f"{name}.{key}": buffer
        for name, layer in model.named_modules()
        if isinstance(layer, _BatchNorm) and layer.running_mean is not None and not is_frozen(layer)
        for key, buffer in layer.named_buffers(recurse=False)
    }


def average_batch_norm_statistics(model: nn.Module, world_size: int) -> None:
    """Replace running means and variances by their averages over the `world_size` processes, in one all-reduce.

    Every process must call it, with the same model. Frozen layers and num_batches_tracked are not changed.
    """
    layers = [layer for layer in batch_norms(model) if not is_frozen(layer)]
    if world_size == 1 or not layers:
        return
    statistics = [s for layer in layers for s in (layer.running_mean, layer.running_var) if s is not None]
    flat = torch.cat([s.detach().float() for s in statistics])
    torch.distributed.all_reduce(flat)
    flat /= world_size
    averages = torch.split(flat, [s.numel() for s in statistics])
    with torch.no_grad():
        for statistic, average in zip(statistics, averages, strict=True):
            statistic.copy_(average)
