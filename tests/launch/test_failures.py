import json
from pathlib import Path

import pytest

from launch.failures import first_failure, rounds, told, users_round

REPORT = """
torch.distributed.elastic.multiprocessing.errors.ChildFailedError:
============================================================
trainer/main.py FAILED
------------------------------------------------------------
Failures:
[1]:
  time      : 2026-11-24_12:00:01
  host      : vm
  rank      : 1 (local_rank: 1)
  exitcode  : {other} (pid: 12)
  error_file: <N/A>
  traceback : Signal 9 (SIGKILL) received by PID 12
------------------------------------------------------------
Root Cause (first observed failure):
[0]:
  time      : 2026-11-24_12:00:01
  host      : vm
  rank      : 0 (local_rank: 0)
  exitcode  : 1 (pid: 11)
  error_file: x
============================================================
"""


def failed(
    logs: Path, rank: int, *, message: str = "", when: float = 0.0, lines: str = "", round_: int = 0
) -> None:
    folder = logs / "id_abc" / f"attempt_{round_}" / str(rank)
    folder.mkdir(parents=True)
    (folder / "stderr.log").write_text(lines)
    if message:
        content = {"message": {"message": message, "extraInfo": {"timestamp": str(when)}}}
        (folder / "error.json").write_text(json.dumps(content))


def test_the_first_in_time_counts_not_the_first_in_rank(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="ValueError: late", when=20.0)
    failed(tmp_path, 1, message="ValueError: early", when=10.0, lines="Traceback\n  x\nValueError: early\n")
    failure = first_failure(tmp_path, host="node7")
    assert (failure.rank, failure.what) == (1, "ValueError: early")
    assert told(failure).splitlines()[0] == "failed: rank 1 on node7: ValueError: early"
    assert str(tmp_path / "id_abc" / "attempt_0" / "1" / "stderr.log") in told(failure)


def test_what_the_user_has_to_mend_is_found_though_the_next_round_has_begun(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="error: no such layer", when=10.0)
    failed(tmp_path, 0, message="RuntimeError: stopped in mid-import", when=11.0, round_=1)
    failure = first_failure(tmp_path, host="h")
    assert (failure.what, failure.is_users) == ("error: no such layer", True)
    first, second = rounds(tmp_path)
    assert users_round(tmp_path, [first, second]) == first
    assert users_round(tmp_path, [second]) is None


def test_an_echo_is_not_the_cause_even_if_it_was_written_down_first(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="RuntimeError: [gloo] Connection closed by peer", when=10.0)
    failed(tmp_path, 2, message="KeyError: 'x'", when=11.0)
    assert first_failure(tmp_path, host="h").what == "KeyError: 'x'"


def test_a_killed_process_has_written_nothing_but_is_the_cause(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="RuntimeError: Connection reset by peer", when=10.0)
    failed(tmp_path, 1, lines="last words\n")
    (tmp_path / "torchrun.log").write_text(REPORT.format(other=-9))
    failure = first_failure(tmp_path, host="h")
    assert (failure.rank, failure.what, failure.lines) == (1, "killed by SIGKILL", ("last words",))
    assert failure.remedy is not None
    assert "memory" in failure.remedy


def test_what_torchrun_has_ended_is_no_cause(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="RuntimeError: gloo", when=10.0)
    failed(tmp_path, 1)
    (tmp_path / "torchrun.log").write_text(REPORT.format(other=-15))
    assert first_failure(tmp_path, host="h").rank == 0


def test_only_the_last_round_counts(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="ValueError: first round", when=10.0)
    failed(tmp_path, 0, message="ValueError: second round", when=20.0, round_=1)
    assert first_failure(tmp_path, host="h").what == "ValueError: second round"


def test_without_any_process_torchruns_own_words_are_shown(tmp_path: Path) -> None:
    (tmp_path / "torchrun.log").write_text("torchrun: error: unrecognised\n")
    failure = first_failure(tmp_path, host="h")
    assert failure.what == "torchrun: error: unrecognised"
    assert failure.log == tmp_path / "torchrun.log"


def test_the_rank_of_a_killed_process_is_that_among_all_machines(tmp_path: Path) -> None:
    failed(tmp_path, 1)
    (tmp_path / "torchrun.log").write_text(
        REPORT.format(other=-9).replace("rank      : 1 (", "rank      : 9 (")
    )
    failure = first_failure(tmp_path, host="node2")
    assert (failure.rank, failure.what) == (9, "killed by SIGKILL")


def test_a_name_that_looks_like_an_echo_is_none(tmp_path: Path) -> None:
    failed(tmp_path, 0, message="ValueError: igloo/1.jpg", when=10.0)
    failed(tmp_path, 1, message="KeyError: 'later'", when=11.0)
    assert first_failure(tmp_path, host="h").what == "ValueError: igloo/1.jpg"


@pytest.mark.parametrize(
    ("message", "word"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate", "train.accumulation"),
        ("RuntimeError: DataLoader worker (pid 3) is killed by signal: Bus error.", "/dev/shm"),
        ("OSError: [Errno 98] Address already in use", "port"),
        ("OSError: [Errno 28] No space left on device", "make room"),
        ("torch.distributed.DistBackendError: NCCL error", "NCCL_DEBUG"),
        ("urllib.error.URLError: <urlopen error>", "network"),
    ],
)
def test_known_failures_come_with_a_remedy(message: str, word: str, tmp_path: Path) -> None:
    failed(tmp_path, 0, message=message, when=1.0)
    remedy = first_failure(tmp_path, host="h").remedy
    assert remedy is not None
    assert word in remedy


def test_a_half_written_or_foreign_error_file_is_passed_over(tmp_path: Path) -> None:
    failed(tmp_path, 0, lines="ValueError: in the log\n")
    for number, text in enumerate(('{"mess', "[]", '{"message": "x"}', '{"message": {"message": 1}}')):
        folder = tmp_path / "id_abc" / "attempt_0" / str(number)
        folder.mkdir(exist_ok=True)
        (folder / "error.json").write_text(text)
    assert first_failure(tmp_path, host="h").what == "ValueError: in the log"
