import json
from pathlib import Path

import pytest

from regraft.contract import read_attempts
from tests import runs
from tests.distributed.ranks import run_options
from tests.launching import REPOSITORY, run, torchrun


@pytest.mark.slow
def test_all_ranks_restart_with_half_of_the_micro_batches_after_one_ran_out_of_memory(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    options = run_options(runs.images(tmp_path_factory), tmp_path / "run", train__batch_size=8, data__cache=tmp_path)
    output = run(
        torchrun(2, "--max-restarts=2", "-m", "tests.distributed.out_of_memory", *options), cwd=REPOSITORY, timeout=120
    )
    for size, half in ((4, 2), (2, 1)):
        assert f"[rank 1] failed: out of memory with micro-batches of {size} images" in output
        assert f"the next attempt resumes from the newest checkpoint with micro-batches of {half}, " in output
    assert "micro-batch size 1, as in an earlier attempt" in output
    attempts = read_attempts(tmp_path / "run")
    assert (len(attempts), attempts[-1].state) == (3, "done")
    assert json.loads((tmp_path / "run" / "micro-batch.json").read_text())["size"] == 1
