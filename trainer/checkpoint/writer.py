"""One thread that writes, so that training goes on meanwhile."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from trainer.errors import UserError


class AsyncWriter:
    """Does what it is given in a thread, one thing after the other, until one has failed."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def wait(self) -> bool:
        """Wait for what was begun; return whether it went well. Its error stays in `failure`."""
        if self._last is None:
            return True
        wait([self._last])
        return self._last.exception() is None

    def submit(self, job: Callable[[], None]) -> None:
        """Begin a job, after the one before it: two are never under way. After a failure none is begun."""
        if self.wait():
            self._last = self._pool.submit(job)

    @property
    def failure(self) -> UserError | None:
        """Return what the user has to hear of a job that failed; any other error is raised."""
        error = self._last.exception() if self._last is not None and self._last.done() else None
        if error is None or isinstance(error, UserError):
            return error
        raise error

    def close(self) -> None:
        """Let what was begun come to its end."""
        self._pool.shutdown()
