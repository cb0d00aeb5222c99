"""The trainer, in which rank 1 runs out of memory with micro-batches of more than one image."""

import os

import torch
from torch import Tensor, nn

from trainer.cli import exit_after
from trainer.main import main

_forward = nn.Conv2d.forward


def limited(layer: nn.Conv2d, images: Tensor) -> Tensor:
    if os.environ["RANK"] == "1" and len(images) > 1 and torch.is_grad_enabled():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a capacity of 1 GiB.")
    return _forward(layer, images)


if __name__ == "__main__":
    nn.Conv2d.forward = limited  # type: ignore[method-assign]
    exit_after(main)
