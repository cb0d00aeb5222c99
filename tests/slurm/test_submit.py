"""`regraft submit`, `status` and `doctor` with a real Slurm, and names that a shell could interpret."""

import re
import sys
from pathlib import Path

import pytest

from launch.doctor import measured, nodes
from launch.doctor.finding import DoctorContext
from tests import runs
from tests.slurm.cluster import NODES, Cluster
from tests.slurm.jobs import FINETUNE, run_options, wait_for_step

pytestmark = pytest.mark.slow
REGRAFT = (sys.executable, "-m", "launch.cli")
HOSTILE = """it's "$(touch pwned)" `touch pwned`; touch pwned #50% %j"""


def test_names_are_not_interpreted_by_submit_and_sbatch(
    cluster: Cluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path / f"a run {HOSTILE}"
    images = tmp_path / f"pictures {HOSTILE}"
    images.symlink_to(runs.images(tmp_path_factory))
    options = run_options(tmp_path_factory, folder, train__epochs=1, data__root=images)
    site = tmp_path / "site.yaml"
    site.write_text("partition: normal\nenv: {NOTE: '$(touch pwned)'}\n")

    output = cluster.call(
        *REGRAFT, "submit", f"--job-name={HOSTILE}", "--time=20", f"--site={site}", *options, cwd=tmp_path
    )
    (submitted,) = re.findall(r"^job (\d+) submitted$", output, flags=re.MULTILINE)
    assert f"run folder {folder}\n" in output
    without = [word for word in options if not word.startswith("--run.dir=")]
    by_hand = cluster.submit(f"--job-name={HOSTILE}", FINETUNE, *without, cwd=tmp_path)

    wait_for_step(cluster, submitted, folder, 1)
    status = cluster.call(*REGRAFT, "status", folder)
    assert f"Slurm: job {submitted} is " in status, status
    record = cluster.wait_for(submitted, "COMPLETED")
    assert (record["JobName"], record["Partition"], record["TimeLimit"]) == (HOSTILE, "normal", "00:20:00")
    # Not record["StdOut"]: scontrol shows a `%` in the folder's name differently.
    assert f"job {submitted}: done" in (folder / "logs" / f"slurm-{submitted}.out").read_text(encoding="utf-8")
    status = cluster.call(*REGRAFT, "status", folder)
    assert status.startswith(f"{folder}: done\n"), status
    assert "step 6 of 6, epoch 1 of 1" in status
    assert f"Slurm: job {submitted} is COMPLETED" in status

    cluster.wait_for(by_hand, "COMPLETED")
    (own,) = (tmp_path / "runs").iterdir()
    assert own.name.endswith(f"-{by_hand}")
    for run in (folder, own):
        assert [attempt["state"] for attempt in runs.attempts(run)] == ["done"]
        runs.assert_each_example_once(run, epochs=1)
    assert not [path for root in (tmp_path, cluster.folder) for path in root.rglob("pwned")]


def test_nodes_share_a_folder_and_compute_a_sum(cluster: Cluster, tmp_path: Path) -> None:
    context = DoctorContext(run=tmp_path / "run", processes=1, nodes=2, options=())
    context.measured = {"model": {"gradient_bytes": 1 << 20}}
    done = cluster.run(*nodes.srun_command(context, tmp_path, in_job=False), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    results = measured.parse_output(done.stdout)
    findings = nodes.check_reports(results, nodes=2, failure=None)
    assert [finding.level for finding in findings] == ["green"], findings
    assert findings[0].message == f"{', '.join(NODES)} see each other's files"
    assert "all-reduce" in results, done.stdout + done.stderr
    assert (results["all-reduce"]["processes"], results["all-reduce"]["correct"]) == (2, True)
