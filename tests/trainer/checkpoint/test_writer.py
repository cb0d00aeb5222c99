import threading
from collections.abc import Iterator

import pytest

from trainer.checkpoint.writer import AsyncWriter
from trainer.errors import UserError

PATIENCE = 30.0


@pytest.fixture
def writer() -> Iterator[AsyncWriter]:
    writer = AsyncWriter()
    yield writer
    writer.close()


def fail(error: BaseException) -> None:
    raise error


def test_a_job_is_done_in_another_thread_while_this_one_goes_on(writer: AsyncWriter) -> None:
    go, done_by = threading.Event(), []

    def job() -> None:
        assert go.wait(PATIENCE)
        done_by.append(threading.current_thread().name)

    writer.submit(job)
    assert not done_by
    assert writer.failure is None, "asked while it works"
    go.set()
    assert writer.wait()
    (name,) = done_by
    assert name.startswith("checkpoint")
    assert name != threading.current_thread().name


def test_two_jobs_are_never_under_way(writer: AsyncWriter) -> None:
    done: list[str] = []
    begun, go = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        done.append("first")

    writer.submit(first)
    assert begun.wait(PATIENCE)
    given = threading.Event()

    def give_another() -> None:
        writer.submit(lambda: done.append("second"))
        given.set()

    other = threading.Thread(target=give_another)
    other.start()
    assert not given.wait(0.2), "it waits to be taken"
    assert not done
    go.set()
    other.join(PATIENCE)
    assert given.is_set()
    assert writer.wait()
    assert done == ["first", "second"]


def test_many_jobs_are_done_in_their_order(writer: AsyncWriter) -> None:
    done: list[int] = []
    under_way = threading.Semaphore(1)

    def job(number: int) -> None:
        assert under_way.acquire(blocking=False)
        done.append(number)
        under_way.release()

    for number in range(200):
        writer.submit(lambda number=number: job(number))
    assert writer.wait()
    assert done == list(range(200))


def test_what_the_user_has_to_hear_is_kept_and_nothing_more_is_begun(writer: AsyncWriter) -> None:
    error, done = UserError("the disk is full"), []
    writer.submit(lambda: fail(error))
    for number in range(3):
        assert not writer.wait()
        assert writer.failure is error
        writer.submit(lambda number=number: done.append(number))
    assert not writer.wait()
    assert not done
    writer.close()
    assert writer.failure is error


@pytest.mark.parametrize("error", [ValueError("a defect"), OSError(28, "full"), KeyboardInterrupt()])
def test_any_other_error_is_raised_where_failures_are_asked_for(
    writer: AsyncWriter, error: BaseException
) -> None:
    writer.submit(lambda: fail(error))
    assert not writer.wait()
    for _ in range(2):
        with pytest.raises(type(error)) as caught:
            _ = writer.failure
        assert caught.value is error


def test_closing_waits_for_what_was_begun() -> None:
    writer, done = AsyncWriter(), []
    begun, go = threading.Event(), threading.Event()

    def job() -> None:
        begun.set()
        assert go.wait(PATIENCE)
        done.append("written")

    writer.submit(job)
    assert begun.wait(PATIENCE)
    closed = threading.Event()
    other = threading.Thread(target=lambda: (writer.close(), closed.set()))
    other.start()
    assert not closed.wait(0.2)
    go.set()
    other.join(PATIENCE)
    assert closed.is_set()
    assert done == ["written"]
    assert writer.failure is None
    assert writer.wait()


def test_before_the_first_job_all_is_well() -> None:
    writer = AsyncWriter()
    assert writer.wait()
    assert writer.failure is None
    writer.close()
    writer.close()
