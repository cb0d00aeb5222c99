"""Construct models without memory for their parameters."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from accelerate import init_empty_weights


@contextmanager
def on_meta_device(name: str) -> Iterator[None]:
    """Construct models with parameters on the meta device within a block; the random state is restored at its end.

    Buffers, which may be constants of the architecture, keep their values.
    """
    with ExitStack() as stack:
        # Some layers draw random numbers before their parameters are moved.
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(init_empty_weights())
        # The position embedding of torchvision's ViT may be large. RegNets cannot be constructed in this context.
        if name.startswith("vit_"):
            stack.enter_context(torch.device("meta"))
        yield
