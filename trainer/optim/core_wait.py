"""How long the threads of this process wait for a core, since other processes use the cores."""

import time
from pathlib import Path

MAX_FRACTION = 0.2
"""A measurement of speed is disturbed from this `CoreWait.fraction` on. Measured on 2 cores with 2 threads: at most
0.03 on an idle machine, 1.2 beside three other processes."""


class CoreWait:
    """Counts the time for which threads wait for a core, from its creation on."""

    def __init__(self) -> None:
        self._began, self._waited = time.perf_counter(), _seconds_waited()

    def fraction(self) -> float:
        """Return the waiting time of all threads, as a fraction of the time; 0 if the kernel does not count it."""
        elapsed = time.perf_counter() - self._began
        return max(0.0, _seconds_waited() - self._waited) / max(elapsed, 1e-9)


def _seconds_waited() -> float:
    """Return the seconds that the living threads have waited for a core: `run_delay` in the kernel's sched-stats."""
    nanoseconds = 0
    for file in Path("/proc/self/task").glob("*/schedstat"):
        try:
            nanoseconds += int(file.read_text(encoding="ascii").split()[1])
        except (OSError, IndexError, ValueError):  # the thread has ended, or the kernel does not count
            continue
    return nanoseconds / 1e9
