"""Fixtures for tests of the trainer."""

import pytest
from accelerate import Accelerator

from trainer.distributed.context import DistributedContext, init_distributed


@pytest.fixture
def ctx() -> DistributedContext:
    """Return the context of a single process on the CPU, in fp32, with one thread."""
    return init_distributed(device="cpu", precision="fp32", threads=1)


@pytest.fixture
def accelerator(ctx: DistributedContext) -> Accelerator:
    return ctx.accelerator
