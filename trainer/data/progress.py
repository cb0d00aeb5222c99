"""Hooks for progress displays while the data is prepared."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ProgressHooks:
    """Progress displays of long operations; by default nothing is shown."""

    downloading: Callable[[str], AbstractContextManager[Callable[[int, int | None], None] | None]] = lambda name: (
        nullcontext()
    )
    """Opens a display for the dataset `name`; it yields a callback for (bytes downloaded, total bytes or None)."""
    checking: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext
    """Opens a display; it yields a callback for (images checked, total images)."""
    caching: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext
    """Opens a display; it yields a callback for (images cached, total images)."""
    comparing: Callable[[], AbstractContextManager[Callable[[int, int], None] | None]] = nullcontext
    """Opens a display; it yields a callback for (images compared with all others, total images)."""


NO_PROGRESS = ProgressHooks()
