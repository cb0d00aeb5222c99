"""Which rank's hang is shown: not one of those that only waited for it."""

from pathlib import Path

from launch import contract
from launch.failures import first_failure, told
from tests.launch.test_failures import REPORT, failed
from trainer.distributed import watchdog

WAITED = (
    f"Hang: no step for 300 s, the last one was 7; {watchdog.WAITS} in all_reduce "
    "(distributed/distributed_c10d.py:1)"
)
READ = "Hang: no step for 300 s, the last one was 7; it was in select (selectors.py:1); stacks in /gloo/hangs/x.txt"


def test_both_sides_mean_the_same_folder_and_the_same_words() -> None:
    assert contract.HANGS == watchdog.HANGS
    assert READ.startswith(f"{watchdog.Hang.__name__}: ")


def test_the_rank_that_hangs_is_shown_not_those_that_wait_for_it(tmp_path: Path) -> None:
    failed(tmp_path, 0, message=WAITED, when=10.0)
    failed(tmp_path, 1, message=READ, when=11.0)
    failed(tmp_path, 2, message="RuntimeError: Connection closed by peer", when=9.0)
    failure = first_failure(tmp_path, host="node7")
    assert told(failure).splitlines()[0] == f"failed: rank 1 on node7: {READ}"
    assert failure.remedy is not None
    assert "run.hang_timeout" in failure.remedy


def test_if_all_of_them_wait_it_is_one_that_is_silent(tmp_path: Path) -> None:
    failed(tmp_path, 0, message=WAITED, when=10.0)
    failed(tmp_path, 1)
    (tmp_path / "torchrun.log").write_text(REPORT.format(other=-9))  # it did not answer to TERM
    failure = first_failure(tmp_path, host="h")
    assert (failure.rank, failure.what) == (0, WAITED)
    assert failure.remedy is not None
    assert "was stopped, or its machine is out of reach" in failure.remedy
