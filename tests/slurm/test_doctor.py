import json
from pathlib import Path

import pytest

from launch.doctor import measured as pace
from launch.doctor import nodes
from tests.slurm.cluster import NODES, Cluster

pytestmark = pytest.mark.slow


def test_nodes_see_one_folder_and_exchange_a_sum(cluster: Cluster, tmp_path: Path) -> None:
    command = nodes.srun(tmp_path, nodes=2, processes=1, size=1 << 20, inside=False)
    done = cluster.run(*command, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    told = nodes.read(done.stdout)
    assert [one["host"] for one in told] == list(NODES)
    found = nodes.judge(told, nodes=2, why=None)
    assert [one.level for one in found] == ["green", "green", "green"], found
    summed = pace.read(done.stdout).get("allreduce")
    assert summed is not None, done.stdout + done.stderr
    assert (summed["ranks"], summed["right"]) == (2, True)
    assert json.loads((tmp_path / "node-1.json").read_text())["address"] == "127.0.0.1", "as Slurm knows it"
