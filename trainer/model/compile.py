"""torch.compile of the model: kernels are built for each batch size when it comes first."""

import random

import torch
from torch import nn

from trainer.errors import UserError

BACKEND = "inductor"
_MAX_VARIANTS = 64
"""Variants of a model that are compiled: sizes of full and last batches, training and evaluation, unfreezing stages.

torch's own limit of 8 would silently leave further ones uncompiled.
"""


def compile_model(model: nn.Module) -> None:
    """Compile a model in place: its names of parameters stay the same, and a copy of it is not compiled.

    Each batch size gets kernels of its own. An epoch has few: that of the full batches and that of the last one.

    Args:
        model: unwrapped, prepared by accelerate. Within DDP's forward, torch splits the graph at the gradient buckets,
            so that their reduction overlaps with the backward pass.

    """
    import torch._dynamo  # noqa: PLC0415 (takes seconds)

    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _MAX_VARIANTS)
    model.compile(backend=BACKEND, dynamic=False)


def check_compiler(device: torch.device) -> None:
    """Build and run a small kernel.

    Raises:
        UserError: torch.compile cannot build kernels here.

    """
    number = random.random()

    def add(values: torch.Tensor) -> torch.Tensor:
        return values + number

    try:
        torch.compile(add, backend=BACKEND, dynamic=False)(torch.ones(8, device=device))
    except Exception as error:
        reason = " ".join(str(error).splitlines()[:2])[:300]
        needed = "triton and gcc" if device.type == "cuda" else "g++"
        raise UserError(
            f"train.compile is true, but torch.compile cannot build kernels on this machine ({reason}). It needs "
            f"{needed}, and Python's headers (python3-dev on Debian): install them, or set train.compile to false"
        ) from error
