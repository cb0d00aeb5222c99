from pathlib import Path

import pytest

from launch.failures import find_user_error, first_failure, format_failure, lost_logs, restart_dirs
from regraft.contract import HANG_WAITING
from tests.launch.helpers import write_failure, write_report
from trainer.distributed.watchdog import Hang

WAITING = f"Hang: no step for 300 s, the last one was 7; {HANG_WAITING} in all_reduce (distributed_c10d.py:1)"
READING = "Hang: no step for 300 s, the last one was 7; it was in select (selectors.py:1); stacks in /gloo/hangs/x.txt"


@pytest.mark.parametrize(
    ("messages", "exit_code_of_rank_1", "cause"),
    [
        # The first error in time.
        ({0: ("ValueError: late", 20), 1: ("ValueError: early", 10)}, None, 1),
        # Secondary errors come last, but not everything that resembles one is one.
        ({0: ("RuntimeError: [gloo] Connection closed by peer", 10), 2: ("KeyError: 'x'", 11)}, None, 2),
        ({0: ("ValueError: igloo/1.jpg", 10), 1: ("KeyError: 'later'", 11)}, None, 0),
        # A killed process, unless torchrun terminated it.
        ({0: ("RuntimeError: Connection reset by peer", 10), 1: ("", 0)}, -9, 1),
        ({0: ("RuntimeError: gloo", 10), 1: ("", 0)}, -15, 0),
        # The rank that hangs comes before those that wait for it, unless it was killed.
        ({0: (WAITING, 10), 1: (READING, 11), 2: ("RuntimeError: Connection closed by peer", 9)}, None, 1),
        ({0: (WAITING, 10), 1: ("", 0)}, -9, 0),
    ],
)
def test_first_failure_is_the_cause(
    tmp_path: Path, messages: dict[int, tuple[str, float]], exit_code_of_rank_1: int | None, cause: int
) -> None:
    assert READING.startswith(f"{Hang.__name__}: "), "the trainer's error"
    for rank, (message, time) in messages.items():
        write_failure(tmp_path, rank, message=message, time=time, lines="last words\n")
    if exit_code_of_rank_1 is not None:
        write_report(tmp_path, code=exit_code_of_rank_1)
    error = messages[cause][0] or "killed by SIGKILL"
    failure = first_failure(tmp_path, host="node7")
    assert (failure.rank, failure.error, failure.lines) == (cause, error, ("last words",))
    lines = format_failure(failure).splitlines()
    assert lines[:2] == [f"failed: rank {cause} on node7: {error}", "  | last words"]
    assert f"log: {tmp_path}/id_abc/attempt_0/{cause}/stderr.log" in lines


def test_user_error_is_found_although_the_next_restart_has_begun(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, message="error: no such layer", time=10.0)
    write_failure(tmp_path, 0, message="RuntimeError: stopped in mid-import", time=11.0, restart=1)
    failure = first_failure(tmp_path, host="h")
    assert (format_failure(failure), failure.is_user_error) == ("error: no such layer", True)
    first, second = restart_dirs(tmp_path)
    assert find_user_error(tmp_path, [first, second]) == first
    assert find_user_error(tmp_path, [second]) is None


def test_torchruns_log_the_last_restart_and_the_global_rank_count(tmp_path: Path) -> None:
    (tmp_path / "torchrun.log").write_text("torchrun: error: unrecognized\n")
    failure = first_failure(tmp_path, host="h")
    assert (failure.error, failure.log) == ("torchrun: error: unrecognized", tmp_path / "torchrun.log")
    write_failure(tmp_path, 0, message="ValueError: first", time=10.0)
    write_failure(tmp_path, 0, message="ValueError: second", time=20.0, restart=1)
    assert first_failure(tmp_path, host="h").error == "ValueError: second"
    write_failure(tmp_path, 1, restart=2)
    write_report(tmp_path, code=-9, rank=9)
    failure = first_failure(tmp_path, host="node2")
    assert (failure.rank, failure.error) == (9, "killed by SIGKILL")


@pytest.mark.parametrize(
    ("message", "remedy"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "train.micro_batch_size auto"),
        ("OutOfMemory: out of memory with micro-batches of 8 images (CUDA out of memory.)", "the same command resumes"),
        ("RuntimeError: DataLoader worker (pid 3) is killed by signal: Bus error.", "/dev/shm"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("OSError: [Errno 28] No space left on device", "free some space"),
        ("torch.distributed.DistBackendError: NCCL error", "NCCL_DEBUG"),
        ("urllib.error.URLError: <urlopen error>", "network"),
        (READING, "run.hang_timeout"),
        (WAITING, "was suspended, or its machine is unreachable"),
        ("", "memory is full"),
    ],
)
def test_known_failures_have_a_remedy(message: str, remedy: str, tmp_path: Path) -> None:
    write_failure(tmp_path, 0, message=message, time=1.0)
    if not message:
        write_report(tmp_path, code=-9)
    assert remedy in str(first_failure(tmp_path, host="h").remedy)


def test_escape_sequences_of_logs_are_not_sent_to_the_terminal(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, message="ValueError: \x1b[2J", time=1.0, lines="\x1b]0;owned\x07\tlast words\n")
    text = format_failure(first_failure(tmp_path, host="h"))
    assert all(line.isprintable() for line in text.split("\n"))
    assert "ValueError: \\x1b[2J\n" in text


def test_incomplete_error_files_are_skipped(tmp_path: Path) -> None:
    write_failure(tmp_path, 0, lines="ValueError: in the log\n")
    for number, text in enumerate(('{"mess', "[]", '{"message": "x"}', '{"message": {"message": 1}}')):
        folder = tmp_path / "id_abc" / "attempt_0" / str(number)
        folder.mkdir(exist_ok=True)
        (folder / "error.json").write_text(text)
    assert first_failure(tmp_path, host="h").error == "ValueError: in the log"


def test_a_run_folder_that_is_gone_is_an_error_of_the_user(tmp_path: Path) -> None:
    failure = lost_logs(tmp_path / "run" / "logs" / "0001")
    assert failure.is_user_error
    assert format_failure(failure).startswith(f"error: {tmp_path / 'run'} is gone: it was deleted or moved")
