"""Parameter groups, the optimizer over them, and its learning rate at a step."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Group:
    """Parameters that share a learning rate."""

    name: str
    parameters: tuple[nn.Parameter, ...]
    lr: float
    """Peak learning rate."""
    weight_decay: float


def group_parameters(
    model: nn.Module, heads: Sequence[str], *, lr: float, head_lr_scale: float, weight_decay: float
) -> tuple[Group, ...]:
    """Return the groups `backbone` (at lr) and `head` (at head_lr_scale x lr) of what trains.

    `heads` are the dotted names of the output layers, as in `model.named_modules()`: a parameter is the
    head's because it belongs to that module, not because its name looks like one.
    """
    in_head = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = (
        Group("backbone", tuple(p for p in trained if id(p) not in in_head), lr, weight_decay),
        Group("head", tuple(p for p in trained if id(p) in in_head), lr * head_lr_scale, weight_decay),
    )
    return tuple(group for group in groups if group.parameters)


def make_optimizer(
    name: Literal["sgd", "adamw"], groups: Iterable[Group], *, momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer; each of its groups keeps its `name` and its `peak_lr`."""
    settings = [
        {
            "params": list(g.parameters),
            "name": g.name,
            "lr": g.lr,
            "peak_lr": g.lr,
            "weight_decay": g.weight_decay,
        }
        for g in groups
    ]
    # On a GPU the fused kernels also keep fp16's overflow check on the device.
    fused = True if all(p.is_cuda for s in settings for p in s["params"]) else None  # type: ignore[attr-defined]
    if name == "sgd":
        sgd = torch.optim.SGD(settings, momentum=momentum, fused=fused)
        if fused and momentum:
            # An update that fp16's loss scaling skips would leave the fused kernel's first moments as it found them.
            for parameter in (p for s in settings for p in s["params"]):  # type: ignore[attr-defined]
                sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd
    return torch.optim.AdamW(settings, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return group name -> learning rate."""
    return {group["name"]: float(group["lr"]) for group in optimizer.param_groups}
