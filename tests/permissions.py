"""Let the permissions of files apply to root, too, which the tests may run as."""

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager

_VERSION = 0x20080522  # _LINUX_CAPABILITY_VERSION_3
_OVERRIDE = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH
_libc = ctypes.CDLL(None, use_errno=True)


class _Header(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Capabilities(ctypes.Structure):
    _fields_ = (("effective", ctypes.c_uint32), ("permitted", ctypes.c_uint32), ("inheritable", ctypes.c_uint32))


@contextmanager
def file_permissions_apply() -> Iterator[None]:
    """Take the right to read and write every file from this thread, and from those that it starts in the block.

    Processes that it starts get the right back.
    """
    header, capabilities = _Header(_VERSION, 0), (_Capabilities * 2)()
    _call(_libc.capget, header, capabilities)
    before = capabilities[0].effective
    capabilities[0].effective = before & ~_OVERRIDE
    _call(_libc.capset, header, capabilities)
    try:
        yield
    finally:
        capabilities[0].effective = before
        _call(_libc.capset, header, capabilities)


def _call(function: "ctypes._NamedFuncPointer", header: _Header, capabilities: "ctypes.Array[_Capabilities]") -> None:
    if function(ctypes.byref(header), capabilities):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
