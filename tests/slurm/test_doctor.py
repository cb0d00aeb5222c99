from pathlib import Path

import pytest

from launch.doctor import measured, nodes
from launch.doctor.finding import DoctorContext
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow


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
