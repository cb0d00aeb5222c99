"""`sbatch slurm/finetune.sh` on a real Slurm: runs that nobody disturbs, and errors that always come again."""

import os
from pathlib import Path

import pytest
import yaml

from tests.kills import attempts, require_each_once, saved_step, worlds
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import ARRAY, FINETUNE, require_as_one_process, wait_until_all_have_left, words

pytestmark = pytest.mark.slow


def test_a_job_of_two_nodes_trains_as_one_process_does_and_once_done_is_done(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    job = cluster.submit("--nodes=2", FINETUNE, *words(tmp_path_factory, folder), cwd=tmp_path)
    record = cluster.wait_for(job, "COMPLETED")
    assert (record["NumNodes"], record["ExitCode"], record["Restarts"]) == ("2", "0:0", "0")
    assert [attempt["state"] for attempt in attempts(folder)] == ["done"]
    assert set(worlds(folder)) == {2}
    said = cluster.output(job)
    assert said.count("24 of 24 evaluated") == 1, said

    cluster.call("scontrol", "requeue", job)  # as Slurm does where a node fails while the job ends
    require_as_one_process(folder, tmp_path_factory)
    cluster.wait(job, lambda: cluster.restarts(job) == 1, "queued again", also_after=True)
    record = cluster.wait_for(job, "COMPLETED")
    assert (record["ExitCode"], record["Restarts"]) == ("0:0", "1")
    assert len(attempts(folder)) == 1, "no process was started"
    assert "is already done" in cluster.output(job).removeprefix(said)


FAILS_AT_UPDATE_5 = """\
import json, os, pathlib, time
if "RANK" in os.environ:
    from torch.optim.optimizer import register_optimizer_step_post_hook

    def fail(*_):
        run = pathlib.Path(os.environ["RUN"])
        if json.loads((run / "audit/rank-0.jsonl").read_text().splitlines()[-1])["step"] == 4:
            while not any('"step": 4,' in path.read_text() for path in run.glob("attempts/*.json")):
                time.sleep(0.1)
            raise ArithmeticError("as always here")

    register_optimizer_step_post_hook(fail)
"""


def test_an_error_that_comes_again_does_not_queue_its_job_for_ever(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    def submit(name: str, *options: str) -> str:
        own = words(tmp_path_factory, tmp_path / name)
        return cluster.submit(
            FINETUNE, "--max-restarts=0", *own, *options, cwd=tmp_path, environment=broken(name)
        )

    def broken(name: str) -> dict[str, str]:
        path = [str(tmp_path / "broken"), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path), "RUN": str(tmp_path / name)}

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "sitecustomize.py").write_text(FAILS_AT_UPDATE_5)
    unreadable = tmp_path / "pictures"
    for kind in ("train", "val"):
        (unreadable / kind / "a").mkdir(parents=True)
        (unreadable / kind / "a" / "0.png").write_text("no picture")
    option = submit("option", "--train.epoch=3")
    data = submit("data", f"--data.root={unreadable}")
    update = submit("update")
    for job, restarts, code, why in (
        (option, 0, 2, "error: command line: there is no option 'train.epoch'"),
        (data, 0, 2, str(unreadable)),
        (update, 1, 1, "failed: rank 0 on node1: ArithmeticError: as always here"),
    ):
        record = cluster.wait_for(job, "FAILED")
        wait_until_all_have_left(cluster, job)
        assert cluster.state(job) == "FAILED"
        said = cluster.output(job)
        assert (int(record["Restarts"]), record["ExitCode"]) == (restarts, f"{code}:0"), said
        assert said.count(why) == restarts + 1, said
    assert not attempts(tmp_path / "option")
    assert [(made["state"], made["step"]) for made in attempts(tmp_path / "update")] == [("failed", 4)] * 2
    assert saved_step(tmp_path / "update") == 4


def test_an_array_trains_each_of_its_tasks_in_a_folder_and_with_a_seed_of_its_own(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    sweep = tmp_path / "runs of three"
    options = words(tmp_path_factory, sweep, train__epochs=1)
    array = cluster.submit("--array=0-2", ARRAY, *options, cwd=tmp_path)
    cluster.wait_for(array, "COMPLETED")
    tasks = {record["ArrayTaskId"]: record for record in cluster.records(array)}
    assert {task: record["Restarts"] for task, record in tasks.items()} == {"0": "0", "1": "0", "2": "0"}
    folders = [sweep / task for task in sorted(tasks)]
    assert sorted(sweep.iterdir()) == folders
    seeds, results = [], set()
    for folder in folders:
        assert [attempt["state"] for attempt in attempts(folder)] == ["done"]
        require_each_once(folder, epochs=1)
        seeds.append(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))["run"]["seed"])
        results.add((folder / "model.safetensors").read_bytes())
    assert seeds == [0, 1, 2]
    assert len(results) == 3
