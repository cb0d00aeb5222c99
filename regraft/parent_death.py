"""Let the kernel signal this process when its parent ends."""

import ctypes
import os

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def signal_on_parent_death(number: int) -> None:
    """Ask the kernel to send this process a signal when its parent ends, even by SIGKILL.

    Raises:
        OSError: the kernel refused.

    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, number, 0, 0, 0) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"prctl(PR_SET_PDEATHSIG): {os.strerror(code)}")
