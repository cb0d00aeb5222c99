"""Construct models without memory for their parameters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.overrides import TorchFunctionMode

_INIT_FUNCTIONS = {
    "normal_", "uniform_", "trunc_normal_", "kaiming_normal_", "kaiming_uniform_", "xavier_normal_", "xavier_uniform_",
    "constant_", "zeros_", "ones_", "fill_", "zero_", "erfinv_", "mul_", "add_", "sub_", "div_", "clamp_",
}  # fmt: skip
"""Functions of `torch.nn.init` and `Tensor` that initialize a tensor in place and do not change its shape."""


@contextmanager
def on_meta_device(name: str) -> Iterator[None]:
    """Construct models with parameters on the meta device within a block; the random state is restored at its end.

    Buffers, which may be constants of the architecture, keep their values.
    """
    with ExitStack() as stack:
        # Some layers draw random numbers before their parameters are moved.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(init_empty_weights())
        stack.enter_context(_SkipInit())
        # The position embedding of torchvision's ViT may be large. RegNets cannot be constructed in this context.
        if name.startswith("vit_"):
            stack.enter_context(torch.device("meta"))
        yield


class _SkipInit(TorchFunctionMode):
    """Skip the initialization of tensors on the meta device, which takes most of the construction of some models."""

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensor = args[0] if args and getattr(function, "__name__", None) in _INIT_FUNCTIONS else None
        if isinstance(tensor, Tensor) and tensor.is_meta:
            return tensor
        return function(*args, **(kwargs or {}))
