"""Jobs that are stopped, preempted, cancelled, or lose a process or a node, on a real Slurm."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.kills import attempts, last_step, saved_step, worlds
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    FINETUNE,
    ranks,
    require_as_one_process,
    wait_for_restart,
    wait_for_step,
    wait_until_all_have_left,
    wait_until_saved,
    words,
)


def steps_made(folder: Path) -> list[int]:
    """Return the updates in the order in which rank 0 made them, those that were lost and made again twice."""
    lines = (folder / "audit" / "rank-0.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line)["step"] for line in lines]


def preempt(cluster: Cluster, folder: Path) -> str:
    """Submit a job that takes the whole cluster from others for a second; returns its id."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    return cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", urgent, cwd=folder)


@pytest.mark.slow
def test_a_job_that_is_warned_of_its_time_limit_and_one_that_is_preempted_save_and_go_on(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    job = cluster.submit("--nodes=2", FINETUNE, *words(tmp_path_factory, folder), cwd=tmp_path)
    wait_for_step(cluster, job, folder, 3)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does ahead of the time limit
    wait_for_restart(cluster, job, 1)

    wait_for_step(cluster, job, folder, saved_step(folder) + 2, after=1)
    other = preempt(cluster, tmp_path)
    wait_for_restart(cluster, job, 2)
    cluster.wait_for(other, "COMPLETED")

    record = cluster.wait_for(job, "COMPLETED")
    made = attempts(folder)
    said = cluster.output(job)
    print(f"stopped after the steps {[attempt['step'] for attempt in made[:-1]]}")
    assert [attempt["state"] for attempt in made] == ["stopped", "stopped", "done"], said
    assert record["Restarts"] == "2"
    assert 3 <= made[0]["step"] < made[1]["step"] < made[2]["step"]
    assert steps_made(folder) == list(range(made[2]["step"])), "no update was lost, or made twice"
    assert f"stopped by SIGUSR1, saved after step {made[0]['step']}" in said, said
    assert f"stopped by SIGTERM, saved after step {made[1]['step']}" in said, said
    assert set(worlds(folder)) == {2}
    require_as_one_process(folder, tmp_path_factory)


@pytest.mark.slow
def test_a_job_that_is_preempted_before_it_trains_is_queued_again(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    job = cluster.submit(FINETUNE, *words(tmp_path_factory, folder, train__epochs=1), cwd=tmp_path)
    cluster.wait(job, lambda: [*folder.glob("logs/*/node-0/torchrun.log")], "torchrun is started")
    preempt(cluster, tmp_path)  # of which Slurm tells the nodes' tasks, and not the batch script
    wait_for_restart(cluster, job, 1)
    assert not attempts(folder), "it came too late"
    assert "stopped by SIGTERM before training started" in cluster.output(job), cluster.output(job)


@pytest.mark.slow
def test_a_job_that_a_person_ends_saves_and_is_not_queued_again(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = {}
    for name in ("cancelled", "stopped"):
        folder = tmp_path / name
        jobs[folder] = cluster.submit(FINETUNE, *words(tmp_path_factory, folder), cwd=tmp_path)
    cancelled, stopped = jobs
    for folder, job in jobs.items():
        wait_for_step(cluster, job, folder, 3)
        if folder is cancelled:
            cluster.call("scancel", job)
        else:
            (folder / "STOP").touch()
    for folder, state, reason in (
        (cancelled, "CANCELLED", "SIGTERM"),
        (stopped, "FAILED", "the file STOP"),
    ):
        cluster.wait_for(jobs[folder], state)
        wait_until_all_have_left(cluster, jobs[folder])
        record = cluster.record(jobs[folder])
        assert (record["JobState"], record["ExitCode"], record["Restarts"]) == (state, "75:0", "0")
        (made,) = attempts(folder)
        assert (made["state"], made["reason"]) == ("stopped", reason), cluster.output(jobs[folder])
        assert 3 <= made["step"] == saved_step(folder) == last_step(folder)


@pytest.mark.slow
def test_a_job_that_loses_a_process_and_then_a_node_goes_on(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    folder = tmp_path / "run"
    options = words(tmp_path_factory, folder)
    job = cluster.submit("--nodes=2", FINETUNE, "--max-restarts=0", *options, cwd=tmp_path)
    step = wait_until_saved(cluster, job, folder, start=0)
    victim = random.Random(seed).choice(ranks(cluster, job))
    print(f"step {step} is saved: SIGKILL to {victim}", flush=True)
    os.kill(victim.pid, signal.SIGKILL)
    wait_for_restart(cluster, job, 1)
    said = cluster.output(job)
    assert f" on {victim.node}: killed by SIGKILL" in said, said
    step = attempts(folder)[0]["step"]  # or a later one, saved meanwhile
    assert f"this start saved a new step ({step}); 1 of 100 attempts are used: requeued" in said, said

    step = wait_until_saved(cluster, job, folder, start=1)
    print(f"step {step} is saved: the second node is lost", flush=True)
    began = time.monotonic()
    cluster.kill_node("node2")
    cluster.wait(job, lambda: cluster.state(job) != "RUNNING", "the node is missed")
    print(f"missed after {time.monotonic() - began:.1f} s", flush=True)
    cluster.start_node("node2")
    wait_for_restart(cluster, job, 2)

    record = cluster.wait_for(job, "COMPLETED")
    assert record["Restarts"] == "2"
    made = attempts(folder)
    print(f"attempts: {[(attempt['state'], attempt['step']) for attempt in made]}")
    assert len(made) == 3
    assert made[-1]["state"] == "done"
    assert "done" not in [attempt["state"] for attempt in made[:-1]]
    require_as_one_process(folder, tmp_path_factory)


@pytest.mark.soak
def test_a_job_that_loses_the_node_of_its_batch_script_goes_on(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    job = cluster.submit("--nodes=2", FINETUNE, *words(tmp_path_factory, folder), cwd=tmp_path)
    step = wait_until_saved(cluster, job, folder, start=0)
    print(
        f"step {step} is saved: the first node, and with it the batch script, is lost for a moment",
        flush=True,
    )
    began = time.monotonic()
    cluster.kill_node("node1")
    cluster.start_node("node1")
    wait_for_restart(cluster, job, 1)
    print(f"started again after {time.monotonic() - began:.1f} s", flush=True)
    cluster.wait_for(job, "COMPLETED")
    assert attempts(folder)[-1]["state"] == "done"
    require_as_one_process(folder, tmp_path_factory)
