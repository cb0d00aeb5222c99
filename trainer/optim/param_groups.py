"""Parameter groups, the optimizer, and its learning rates."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that share a learning rate and a weight decay."""

    name: Literal["backbone", "head"]
    parameters: tuple[nn.Parameter, ...]
    lr: float
    """Peak learning rate."""
    weight_decay: float


def group_parameters(
    model: nn.Module,
    heads: Sequence[str],
    *,
    lr: float,
    head_lr_scale: float,
    weight_decay: float,
    decay_norm_and_bias: bool = True,
    lr_mult: Mapping[str, float] | None = None,
    trainable: Collection[str] | None = None,
) -> tuple[ParamGroup, ...]:
    """Return the parameter groups: the backbone at `lr`, the head at `head_lr_scale * lr`, each times its `lr_mult`.

    Without `lr_mult`, and with weight decay on all parameters, there are at most two groups: `backbone` and `head`.

    Args:
        model: with its new output layers.
        heads: dotted names of the output layers, as in `model.named_modules()`. A parameter belongs to the head if
            that module holds it, whatever its name.
        lr: peak learning rate of the backbone.
        head_lr_scale: factor of the head's learning rate.
        weight_decay: weight decay of every parameter.
        decay_norm_and_bias: False sets weight decay to 0 for one-dimensional parameters: norms and biases (He et al.
            2019, Bag of Tricks).
        lr_mult: parameter name -> factor of its learning rate; 1 by default.
        trainable: names of the parameters that train in any stage; None: those that require a gradient now.

    """
    in_head = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    groups: dict[tuple[Literal["backbone", "head"], float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name not in trainable if trainable is not None else not parameter.requires_grad:
            continue
        is_head = id(parameter) in in_head
        group_lr = lr * (head_lr_scale if is_head else 1.0) * (lr_mult or {}).get(name, 1.0)
        decay = weight_decay if decay_norm_and_bias or parameter.ndim > 1 else 0.0
        groups.setdefault(("head" if is_head else "backbone", group_lr, decay), []).append(parameter)
    # The backbone's groups come first, the lowest learning rates first.
    return tuple(ParamGroup(key[0], tuple(groups[key]), key[1], key[2]) for key in sorted(groups))


def create_optimizer(
    name: Literal["sgd", "adamw"], groups: Iterable[ParamGroup], *, momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer. Each of its groups has a `name` and a `peak_lr`."""
    settings: list[dict[str, Any]] = [
        {
            "params": list(group.parameters),
            "name": group.name,
            "lr": group.lr,
            "peak_lr": group.lr,
            "weight_decay": group.weight_decay,
        }
        for group in groups
    ]
    # The fused kernels update all parameters of a group in one pass. They keep fp16's overflow check on the device.
    if name == "adamw":
        return torch.optim.AdamW(settings, fused=True)
    sgd = torch.optim.SGD(settings, momentum=momentum, fused=True)
    if momentum:
        # The fused kernel would leave a momentum uninitialized if fp16's loss scaling skips the first update, or if the
        # parameter is unfrozen later than others of its group.
        for parameter in (p for s in settings for p in s["params"]):
            sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
    return sgd


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return `backbone` and `head` -> the highest learning rate among its groups."""
    lrs: dict[str, float] = {}
    for group in optimizer.param_groups:
        lrs[group["name"]] = max(float(group["lr"]), lrs.get(group["name"], 0.0))
    return lrs
