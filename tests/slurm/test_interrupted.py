"""Jobs that are stopped, preempted or cancelled, or lose a process or a node, on a real Slurm."""

import json
import os
import random
import signal
from pathlib import Path

import pytest

from tests import runs
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.jobs import (
    FINETUNE,
    ranks,
    require_result_of_one_process,
    run_options,
    wait_for_checkpoint,
    wait_for_exit,
    wait_for_restart,
    wait_for_step,
    with_sitecustomize,
)

TIME_FOR_INTERRUPTIONS = """\
import os, select, signal, sys, time
restart = os.environ.get("SLURM_RESTART_COUNT", "0")
if "RANK" in os.environ and restart == "1":
    class DelayTraining:
        def find_spec(name, path=None, target=None):
            if name == "trainer.train_run":
                signaled, writing = os.pipe()
                os.set_blocking(writing, False)
                signal.set_wakeup_fd(writing)
                select.select([signaled], [], [], 20)
                signal.set_wakeup_fd(-1)

    sys.meta_path.insert(0, DelayTraining)
elif "RANK" in os.environ and restart != "5":
    from torch.optim.optimizer import register_optimizer_step_post_hook

    register_optimizer_step_post_hook(lambda *_: time.sleep(1))
"""
"""A sitecustomize: the second start reaches training when a signal has come, and all but the sixth train slowly."""


def preempt(cluster: Cluster, folder: Path) -> None:
    """Submit a job that preempts all others for a second."""
    urgent = folder / "urgent.sh"
    urgent.write_text("#!/bin/sh\nsleep 1\n")
    cluster.submit("--partition=urgent", "--nodes=2", "--exclusive", urgent, cwd=folder)


@pytest.mark.slow
def test_job_resumes_after_every_interruption(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    rng = random.Random(seed)
    folder = tmp_path / "run"
    environment = with_sitecustomize(tmp_path / "site", TIME_FOR_INTERRUPTIONS)
    options = run_options(tmp_path_factory, folder)
    job = cluster.submit("--nodes=2", FINETUNE, "--max-restarts=0", *options, cwd=tmp_path, **environment)

    wait_for_step(cluster, job, folder, 1)
    cluster.call("scancel", "--batch", "--signal=USR1", job)  # as Slurm does before the time limit
    wait_for_restart(cluster, job, 1)
    (first,) = runs.attempts(folder)

    cluster.wait(job, lambda: [*folder.glob("logs/*.1/node-0/torchrun.log")], "torchrun is started")
    preempt(cluster, tmp_path)  # Slurm signals the tasks on the nodes, but not the batch script
    wait_for_restart(cluster, job, 2)
    assert len(runs.attempts(folder)) == 1, "training had started"

    wait_for_step(cluster, job, folder, first["step"] + 1, after=1)
    preempt(cluster, tmp_path)
    wait_for_restart(cluster, job, 3)
    second = runs.attempts(folder)[1]
    assert (first["state"], second["state"]) == ("stopped", "stopped")
    assert runs.saved_step(folder) == second["step"] > first["step"] > 0
    updates = (folder / "audit" / "rank-0.jsonl").read_text(encoding="ascii").splitlines()
    steps = [json.loads(update)["step"] for update in updates]
    assert steps == list(range(second["step"])), "no update was lost, or made twice"

    wait_for_checkpoint(cluster, job, folder, attempt=3)
    victim = rng.choice(ranks(cluster, job))
    print(f"SIGKILL to {victim}")
    os.kill(victim.pid, signal.SIGKILL)
    wait_for_restart(cluster, job, 4)
    third = runs.attempts(folder)[2]

    wait_for_checkpoint(cluster, job, folder, attempt=4)
    node = rng.choice(NODES)  # the batch script runs on the first one
    print(f"loss of {node}")
    cluster.kill_node(node)
    cluster.wait(job, lambda: cluster.record(job)["JobState"] != "RUNNING", "the lost node is detected")
    cluster.start_node(node)
    wait_for_restart(cluster, job, 5)

    record = cluster.wait_for(job, "COMPLETED")
    output = cluster.output(job)
    assert record["Restarts"] == "5"
    states = [attempt["state"] for attempt in runs.attempts(folder)]
    assert (len(states), states.index("done")) == (5, 4), output
    for message in (
        f"stopped by SIGUSR1, saved after step {first['step']}",
        "stopped by SIGTERM before training started",
        f"stopped by SIGTERM, saved after step {second['step']}",
        f" on {victim.node}: killed by SIGKILL",
        f"this start saved a new step ({third['step']}); 3 of 100 attempts are used: requeued",
    ):
        assert message in output, output
    assert set(runs.world_sizes(folder)) == {2}
    require_result_of_one_process(folder, tmp_path_factory)


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
