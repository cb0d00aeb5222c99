"""`sbatch slurm/finetune.sh` on a real Slurm: undisturbed runs, and errors that occur each time."""

from pathlib import Path

import pytest
import yaml

from tests import runs
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    ARRAY,
    FINETUNE,
    require_result_of_one_process,
    run_options,
    wait_for_exit,
    with_sitecustomize,
)

pytestmark = pytest.mark.slow


def test_job_of_two_nodes_has_the_result_of_one_process_and_is_not_started_again(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    job = cluster.submit("--nodes=2", FINETUNE, *run_options(tmp_path_factory, folder), cwd=tmp_path)
    record = cluster.wait_for(job, "COMPLETED")
    assert (record["NumNodes"], record["ExitCode"], record["Restarts"]) == ("2", "0:0", "0")
    assert [attempt["state"] for attempt in runs.attempts(folder)] == ["done"]
    assert set(runs.world_sizes(folder)) == {2}
    output = cluster.output(job)
    assert output.count(f"{runs.EXAMPLES} of {runs.EXAMPLES} evaluated") == 1, output
    cluster.call("scontrol", "requeue", job)  # as Slurm does when a node fails while the job ends
    require_result_of_one_process(folder, tmp_path_factory)
    cluster.wait(job, lambda: cluster.record(job)["Restarts"] == "1", "requeued", also_after_end=True)
    record = cluster.wait_for(job, "COMPLETED")
    assert (record["ExitCode"], record["Restarts"]) == ("0:0", "1")
    assert len(runs.attempts(folder)) == 1, "no process was started"
    assert "is already done" in cluster.output(job).removeprefix(output)


FAIL_AT_UPDATE_5 = """\
import json, os, pathlib, time
if "RANK" in os.environ:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def fail(*_):
        run = pathlib.Path(os.environ["RUN"])
        if json.loads((run / "audit/rank-0.jsonl").read_text().splitlines()[-1])["step"] == 4:
            while not any('"step": 4,' in path.read_text() for path in run.glob("attempts/*.json")):
                time.sleep(0.1)
            raise ArithmeticError("each time")

    register_optimizer_step_post_hook(fail)
"""


def test_job_with_an_error_that_occurs_each_time_is_not_requeued_forever(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    environment = with_sitecustomize(tmp_path / "site", FAIL_AT_UPDATE_5)

    def submit(name: str, *options: str) -> str:
        arguments = [*run_options(tmp_path_factory, tmp_path / name), *options]
        variables = {**environment, "RUN": str(tmp_path / name)}
        return cluster.submit(FINETUNE, "--max-restarts=0", *arguments, cwd=tmp_path, **variables)

    unreadable = tmp_path / "pictures"
    for split in ("train", "val"):
        (unreadable / split / "a").mkdir(parents=True)
        (unreadable / split / "a" / "0.png").write_text("not an image")
    option = submit("option", "--train.epoch=3")
    data = submit("data", f"--data.root={unreadable}")
    update = submit("update")
    for job, restarts, code, message in (
        (option, 0, 2, "error: command line: there is no option 'train.epoch'"),
        (data, 0, 2, str(unreadable)),
        (update, 1, 1, "failed: rank 0 on node1: ArithmeticError: each time"),
    ):
        cluster.wait_for(job, "FAILED")
        wait_for_exit(cluster, job)
        record = cluster.record(job)
        output = cluster.output(job)
        found = (record["JobState"], int(record["Restarts"]), record["ExitCode"])
        assert found == ("FAILED", restarts, f"{code}:0"), output
        assert output.count(message) == restarts + 1, output
    assert not runs.attempts(tmp_path / "option")
    assert [(row["state"], row["step"]) for row in runs.attempts(tmp_path / "update")] == [("failed", 4)] * 2
    assert runs.saved_step(tmp_path / "update") == 4


def test_each_task_of_an_array_has_its_own_folder_and_seed(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = tmp_path / "runs of three"
    options = run_options(tmp_path_factory, sweep, train__epochs=1)
    array = cluster.submit("--array=0-2", ARRAY, *options, cwd=tmp_path)
    cluster.wait_for(array, "COMPLETED")
    assert {record["ArrayTaskId"]: record["Restarts"] for record in cluster.records(array)} == dict.fromkeys("012", "0")
    assert sorted(path.name for path in sweep.iterdir()) == ["0", "1", "2"]
    for seed in range(3):
        folder = sweep / str(seed)
        assert [attempt["state"] for attempt in runs.attempts(folder)] == ["done"]
        runs.assert_each_example_once(folder, epochs=1)
        assert yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["seed"] == seed
    assert len({(sweep / str(seed) / "model.safetensors").read_bytes() for seed in range(3)}) == 3
