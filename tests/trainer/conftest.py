"""Fixtures for tests of the trainer."""

from collections.abc import Iterator

import pytest
import torch
from accelerate import Accelerator

from trainer.distributed.context import DistributedContext, init_distributed


@pytest.fixture
def ctx() -> Iterator[DistributedContext]:
    """Return the context of a single process on the CPU, in fp32, with one thread."""
    threads = torch.get_num_threads()
    yield init_distributed(device="cpu", precision="fp32", threads=1)
    torch.set_num_threads(threads)


@pytest.fixture
def accelerator(ctx: DistributedContext) -> Accelerator:
    return ctx.accelerator
