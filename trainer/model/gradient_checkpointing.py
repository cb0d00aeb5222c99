"""Gradient checkpointing: the activations within a block are computed again in the backward pass, and not kept.

Only the inputs of the blocks stay in memory between forward and backward (Chen et al. 2016, Training Deep Nets with
Sublinear Memory Cost). Gradients and BatchNorm statistics stay the same, bit for bit.

As in batch_norm.py, the `forward` of single modules is replaced by a module-level function, so that names of parameters
do not change and the change survives `deepcopy`, pickling and DDP's wrapper.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from trainer.errors import UserError
from trainer.model.batch_norm import batch_norms


def enable_gradient_checkpointing(model: nn.Module, blocks: Sequence[str], heads: Sequence[str]) -> tuple[str, ...]:
    """Let the model's blocks recompute their activations in the backward pass. Return the names of these modules.

    Args:
        model: changed in place.
        blocks: names of modules or parameters, as `split_into_blocks` returns them. A sequence of residual blocks or
            encoder layers is divided into these.
        heads: names of the output layers, which are left out.

    Raises:
        UserError: no block consists of several layers, as in AlexNet and VGG.

    """
    modules = dict(model.named_modules())
    named = [pair for name in blocks if name in modules for pair in _divide(name, modules[name])]
    named = [(name, module) for name, module in named if not any(f"{head}.".startswith(f"{name}.") for head in heads)]
    if not named:
        raise UserError(
            "train.gradient_checkpointing is on, but no block of this model consists of several layers: use "
            "train.micro_batch_size auto instead, which saves memory with every model"
        )
    for _, module in named:
        module.forward = partial(_forward, module)
    return tuple(name for name, _ in named)


def _divide(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the smallest modules that consist of several layers, and are called one after the other.

    A stage, such as ConvNeXt's, is a module with a sequence of equal blocks; it is divided into its parts.
    """
    children = list(module.named_children())
    is_sequence = _is_sequence(module) and any(any(child.children()) for _, child in children)
    if is_sequence or any(_is_block_sequence(child) for _, child in children):
        for child_name, child in children:
            yield from _divide(f"{name}.{child_name}", child)
    elif children:
        yield name, module


def _is_sequence(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential | nn.ModuleList)


def _is_block_sequence(module: nn.Module) -> bool:
    """Return whether a module is a sequence of two or more blocks of the same class, each of several layers."""
    blocks = list(module.children()) if _is_sequence(module) else []
    return len(blocks) > 1 and len({type(block) for block in blocks}) == 1 and all(any(b.children()) for b in blocks)


def _forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    forward = partial(type(module).forward, module)
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    return checkpoint(forward, *args, use_reentrant=False, context_fn=partial(_contexts, module), **kwargs)


def _contexts(module: nn.Module) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return a context for the forward pass, and one for its repetition in the backward pass."""
    return nullcontext(), _repeat_batch_norm(module, [layer.training for layer in batch_norms(module)])


@contextmanager
def _repeat_batch_norm(module: nn.Module, modes: list[bool]) -> Iterator[None]:
    """Let BatchNorm compute the same as in the forward pass, in the same modes, without a second update of statistics.

    The layers get copies of their statistics meanwhile. `momentum = 0` would not do: `num_batches_tracked` would still
    be counted. Neither would `track_running_stats = False`: the number of tensors kept for backward would differ.
    """
    layers = batch_norms(module)
    buffers, current = [dict(layer._buffers) for layer in layers], [layer.training for layer in layers]
    try:
        for layer, mode in zip(layers, modes, strict=True):
            layer.training = mode
            layer._buffers.update({name: b if b is None else b.clone() for name, b in layer._buffers.items()})
        yield
    finally:
        for layer, mode, before in zip(layers, current, buffers, strict=True):
            layer.training = mode
            layer._buffers.update(before)
