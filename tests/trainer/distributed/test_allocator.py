"""Tests of the settings of the C library's memory allocator."""

import subprocess
import sys

import pytest

from trainer.distributed.allocator import keep_freed_memory

COUNT_PAGE_FAULTS = """
import os, resource, sys
import torch
from trainer.distributed.allocator import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory({})

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**25 + 4096 * number, dtype=torch.uint8) for number in range(6)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(6)))
"""


def test_freed_memory_is_used_again() -> None:
    def count(mode: str) -> int:
        return int(
            subprocess.run([sys.executable, "-c", COUNT_PAGE_FAULTS, mode], check=True, capture_output=True).stdout
        )

    assert count("keep") < count("default") / 10


@pytest.mark.parametrize("name", ["MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"])
def test_settings_of_the_user_are_left_alone(name: str) -> None:
    assert not keep_freed_memory({name: "1"})
