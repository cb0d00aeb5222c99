import threading
from collections.abc import Callable, Iterator

import pytest

from trainer.checkpoint.writer import AsyncWriter
from trainer.errors import UserError

TIMEOUT = 30.0


@pytest.fixture
def writer() -> Iterator[AsyncWriter]:
    writer = AsyncWriter()
    yield writer
    writer.close()


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize("call", ["submit", "close"])
def test_submit_and_close_wait_for_the_job_in_progress(call: str, writer: AsyncWriter) -> None:
    done: list[str] = []
    started, proceed, returned = threading.Event(), threading.Event(), threading.Event()

    def job() -> None:
        started.set()
        assert proceed.wait(TIMEOUT)
        done.append(threading.current_thread().name)

    calls: dict[str, Callable[[], None]] = {
        "submit": lambda: writer.submit(lambda: done.append("second")),
        "close": writer.close,
    }
    writer.submit(job)
    assert started.wait(TIMEOUT)
    assert writer.failure is None, "read while the job is in progress"
    other = threading.Thread(target=lambda: (calls[call](), returned.set()))
    other.start()
    assert not returned.wait(0.2)
    assert not done
    proceed.set()
    other.join(TIMEOUT)
    assert returned.is_set()
    assert writer.wait()
    assert done[0].startswith("checkpoint"), "in a thread of its own"
    assert done[1:] == (["second"] if call == "submit" else [])


def test_jobs_run_one_after_the_other_in_order(writer: AsyncWriter) -> None:
    done: list[int] = []
    running = threading.Lock()

    def job(number: int) -> None:
        assert running.acquire(blocking=False)
        done.append(number)
        running.release()

    for number in range(200):
        writer.submit(lambda number=number: job(number))
    assert writer.wait()
    assert done == list(range(200))


def test_jobs_after_a_failure_are_dropped(writer: AsyncWriter) -> None:
    error, done = UserError("the disk is full"), list[int]()
    writer.submit(lambda: fail(error))
    for number in range(3):
        assert not writer.wait()
        assert writer.failure is error
        writer.submit(lambda number=number: done.append(number))
    assert not writer.wait()
    assert not done


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(28, "full"), KeyboardInterrupt()])
def test_other_errors_are_raised_by_failure(writer: AsyncWriter, error: BaseException) -> None:
    writer.submit(lambda: fail(error))
    assert not writer.wait()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            _ = writer.failure
        assert caught.value is error
