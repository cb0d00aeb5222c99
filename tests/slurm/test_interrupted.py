"""Jobs that are stopped, preempted or cancelled, or lose a process or a node, on a real Slurm."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests import runs
from tests.slurm.cluster import Cluster
from tests.slurm.jobs import (
    FINETUNE,
    SLOW_UPDATES,
    WAIT_BEFORE_TRAINING,
    ranks,
    require_result_of_one_process,
    run_options,
    wait_for_checkpoint,
    wait_for_exit,
    wait_for_restart,
    wait_for_step,
    with_sitecustomize,
)


def steps_made(folder: Path) -> list[int]:
    """Return the updates of rank 0 in order; updates that were lost and made again occur twice."""
    lines = (folder / "audit" / "rank-0.jsonl").read_text(encoding="ascii").splitlines()
    return [json.loads(line)["step"] for line in lines]


def preempt(cluster: Cluster, folder: Path) -> str:
    """Submit a job that preempts all others for a second, and return its id."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    return cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", urgent, cwd=folder)


@pytest.mark.slow
def test_job_saves_and_resumes_after_its_time_limit_and_after_a_preemption(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    environment = with_sitecustomize(tmp_path / "site", SLOW_UPDATES)
    options = run_options(tmp_path_factory, folder)
    job = cluster.submit("--nodes=2", FINETUNE, *options, cwd=tmp_path, **environment)
    wait_for_step(cluster, job, folder, 3)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_for_restart(cluster, job, 1)

    wait_for_step(cluster, job, folder, runs.saved_step(folder) + 2, after=1)
    other = preempt(cluster, tmp_path)
    wait_for_restart(cluster, job, 2)
    cluster.wait_for(other, "COMPLETED")

    record = cluster.wait_for(job, "COMPLETED")
    history = runs.attempts(folder)
    output = cluster.output(job)
    print(f"stopped after the steps {[attempt['step'] for attempt in history[:-1]]}")
    assert [attempt["state"] for attempt in history] == ["stopped", "stopped", "done"], output
    assert record["Restarts"] == "2"
    assert 3 <= history[0]["step"] < history[1]["step"] < history[2]["step"]
    assert steps_made(folder) == list(range(history[2]["step"])), "no update was lost, or made twice"
    assert f"stopped by SIGUSR1, saved after step {history[0]['step']}" in output, output
    assert f"stopped by SIGTERM, saved after step {history[1]['step']}" in output, output
    assert set(runs.world_sizes(folder)) == {2}
    require_result_of_one_process(folder, tmp_path_factory)


@pytest.mark.slow
def test_job_that_is_preempted_before_training_is_requeued(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    environment = with_sitecustomize(tmp_path / "site", WAIT_BEFORE_TRAINING)
    job = cluster.submit(FINETUNE, *run_options(tmp_path_factory, folder), cwd=tmp_path, **environment)
    cluster.wait(job, lambda: [*folder.glob("logs/*/node-0/torchrun.log")], "torchrun is started")
    preempt(cluster, tmp_path)  # Slurm signals the tasks on the nodes, but not the batch script
    wait_for_restart(cluster, job, 1)
    assert not runs.attempts(folder), "it came too late"
    assert "stopped by SIGTERM before training started" in cluster.output(job), cluster.output(job)


@pytest.mark.slow
def test_job_that_a_person_stops_saves_and_is_not_requeued(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    jobs = {}
    for name in ("cancelled", "stopped"):
        folder = tmp_path / name
        options = run_options(tmp_path_factory, folder, train__epochs=1000)  # it is never trained to its end
        jobs[folder] = cluster.submit(FINETUNE, *options, cwd=tmp_path)
    cancelled, stopped = jobs
    for folder, job in jobs.items():
        wait_for_step(cluster, job, folder, 3)
        if folder is cancelled:
            cluster.call("scancel", job)
        else:
            (folder / "STOP").touch()
    for folder, state, reason in ((cancelled, "CANCELLED", "SIGTERM"), (stopped, "FAILED", "the file STOP")):
        cluster.wait_for(jobs[folder], state)
        wait_for_exit(cluster, jobs[folder])
        record = cluster.record(jobs[folder])
        assert (record["JobState"], record["ExitCode"], record["Restarts"]) == (state, "75:0", "0")
        (attempt,) = runs.attempts(folder)
        assert (attempt["state"], attempt["reason"]) == ("stopped", reason), cluster.output(jobs[folder])
        assert 3 <= attempt["step"] == runs.saved_step(folder) == runs.last_step(folder)


@pytest.mark.slow
def test_job_resumes_after_a_killed_process_and_after_a_lost_node(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    folder = tmp_path / "run"
    environment = with_sitecustomize(tmp_path / "site", SLOW_UPDATES)
    options = run_options(tmp_path_factory, folder)
    job = cluster.submit("--nodes=2", FINETUNE, "--max-restarts=0", *options, cwd=tmp_path, **environment)
    step = wait_for_checkpoint(cluster, job, folder, start=0)
    victim = random.Random(seed).choice(ranks(cluster, job))
    print(f"step {step} is saved: SIGKILL to {victim}", flush=True)
    os.kill(victim.pid, signal.SIGKILL)
    wait_for_restart(cluster, job, 1)
    output = cluster.output(job)
    assert f" on {victim.node}: killed by SIGKILL" in output, output
    step = runs.attempts(folder)[0]["step"]  # or a later one, saved meanwhile
    assert f"this start saved a new step ({step}); 1 of 100 attempts are used: requeued" in output, output

    step = wait_for_checkpoint(cluster, job, folder, start=1)
    print(f"step {step} is saved: the second node is lost", flush=True)
    start = time.monotonic()
    cluster.kill_node("node2")
    cluster.wait(job, lambda: cluster.state(job) != "RUNNING", "the lost node is detected")
    print(f"detected after {time.monotonic() - start:.1f} s", flush=True)
    cluster.start_node("node2")
    wait_for_restart(cluster, job, 2)

    record = cluster.wait_for(job, "COMPLETED")
    assert record["Restarts"] == "2"
    history = runs.attempts(folder)
    print(f"attempts: {[(attempt['state'], attempt['step']) for attempt in history]}")
    assert len(history) == 3
    assert history[-1]["state"] == "done"
    assert "done" not in [attempt["state"] for attempt in history[:-1]]
    require_result_of_one_process(folder, tmp_path_factory)


@pytest.mark.soak
def test_job_resumes_after_its_first_node_was_lost(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / "run"
    environment = with_sitecustomize(tmp_path / "site", SLOW_UPDATES)
    options = run_options(tmp_path_factory, folder)
    job = cluster.submit("--nodes=2", FINETUNE, *options, cwd=tmp_path, **environment)
    step = wait_for_checkpoint(cluster, job, folder, start=0)
    print(f"step {step} is saved: the first node, and with it the batch script, is lost for a moment", flush=True)
    start = time.monotonic()
    cluster.kill_node("node1")
    cluster.start_node("node1")
    wait_for_restart(cluster, job, 1)
    print(f"restarted after {time.monotonic() - start:.1f} s", flush=True)
    cluster.wait_for(job, "COMPLETED")
    assert runs.attempts(folder)[-1]["state"] == "done"
    require_result_of_one_process(folder, tmp_path_factory)
