"""Parameter groups, the optimizer over them, and its learning rate at a step."""

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
    scales: Mapping[str, float] | None = None,
    trains: Collection[str] | None = None,
) -> tuple[ParamGroup, ...]:
    """Return groups of what trains: the backbone's at lr, the head's at head_lr_scale x lr, each times its scale.

    Without scales, and with weight decay on all, there are two at most: `backbone` and `head`.

    Args:
        model: with its new output layers.
        heads: their dotted names, as in `model.named_modules()`: a parameter is the head's because it belongs to that
            module, not because its name looks like one.
        lr: peak learning rate.
        head_lr_scale: the head's, as a multiple of it.
        weight_decay: of every parameter.
        decay_norms: False: it is 0 for those of one dimension, norms and biases (He et al. 2019, Bag of Tricks).
        scales: parameter name -> a further multiple of its learning rate; 1 where it is missing.
        trains: names of the parameters that ever train; None: those that require a gradient now.

    """
    in_head = {id(p) for head in heads for p in model.get_submodule(head).parameters()}
    found: dict[tuple[Literal["backbone", "head"], float, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if name not in trains if trains is not None else not parameter.requires_grad:
            continue
        is_head = id(parameter) in in_head
        rate = lr * (head_lr_scale if is_head else 1.0) * (scales or {}).get(name, 1.0)
        decay = weight_decay if decay_norm_and_bias or parameter.ndim > 1 else 0.0
        found.setdefault(("head" if is_head else "backbone", rate, decay), []).append(parameter)
    # The backbone's first, the lowest rates first.
    keys = sorted(found)
    return tuple(ParamGroup(name, tuple(found[name, rate, decay]), rate, decay) for name, rate, decay in keys)


def make_optimizer(
    name: Literal["sgd", "adamw"], groups: Iterable[ParamGroup], *, momentum: float
) -> torch.optim.Optimizer:
    """Return the optimizer; each of its groups keeps its `name` and its `peak_lr`."""
    settings: list[dict[str, Any]] = [
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
    fused = True if all(p.is_cuda for s in settings for p in s["params"]) else None
    if name == "sgd":
        sgd = torch.optim.SGD(settings, momentum=momentum, fused=fused)
        if fused and momentum:
            # An update that fp16's loss scaling skips would leave the fused kernel's first moments as it found them.
            for parameter in (p for s in settings for p in s["params"]):
                sgd.state[parameter] = {"momentum_buffer": torch.zeros_like(parameter)}
        return sgd
    return torch.optim.AdamW(settings, fused=fused)


def set_lr(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set each group to `factor` times its peak learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def current_lr(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Return `backbone` and `head` -> the highest learning rate among its groups."""
    found: dict[str, float] = {}
    for group in optimizer.param_groups:
        found[group["name"]] = max(float(group["lr"]), found.get(group["name"], 0.0))
    return found
