import threading
from collections.abc import Iterator

import pytest

from trainer.checkpoint.writer import AsyncWriter

TIMEOUT = 30.0


@pytest.fixture
def writer() -> Iterator[AsyncWriter]:
    writer = AsyncWriter()
    yield writer
    writer.close()


@pytest.mark.parametrize("call", ["submit", "close"])
def test_submit_and_close_wait_for_the_job_in_progress(call: str, writer: AsyncWriter) -> None:
    done: list[str] = []
    started, proceed, returned = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        assert proceed.wait(TIMEOUT)
        done.append(threading.current_thread().name)

    def wait() -> None:
        writer.submit(lambda: done.append("second")) if call == "submit" else writer.close()
        returned.set()

    writer.submit(job)
    assert started.wait(TIMEOUT)
    assert writer.failure is None, "read while the job is in progress"
    other = threading.Thread(target=wait)
    other.start()
    assert not returned.wait(0.2)
    assert not done
    proceed.set()
    other.join(TIMEOUT)
    assert returned.is_set()
    assert writer.wait()
    assert done[0].startswith("checkpoint"), "in a thread of its own"
    assert done[1:] == (["second"] if call == "submit" else [])


def test_jobs_after_a_failed_one_are_dropped(writer: AsyncWriter) -> None:
    done: list[str] = []
    writer.submit(lambda: done.append(str(1 / 0)))
    writer.submit(lambda: done.append("second"))
    assert not writer.wait()
    assert not done
