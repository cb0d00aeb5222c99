"""A background thread that writes files while training continues."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait

from trainer.errors import UserError


class AsyncWriter:
    """Runs jobs one after the other in a thread. After a job has failed, later jobs are dropped."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None

    def wait(self) -> bool:
        """Wait for the job in progress; return whether it succeeded. Its error stays in `failure`."""
        if self._last is None:
            return True
        wait([self._last])
        return self._last.exception() is None

    def submit(self, job: Callable[[], None]) -> None:
        """Wait for the job before it, and start this one, unless a job has failed."""
        if self.wait():
            self._last = self._pool.submit(job)

    @property
    def failure(self) -> UserError | None:
        """Return the UserError of a job that failed, or None; raise any other error."""
        error = self._last.exception() if self._last is not None and self._last.done() else None
        if error is None or isinstance(error, UserError):
            return error
        raise error

    def close(self) -> None:
        """Finish the job in progress, and end the thread."""
        self._pool.shutdown()
